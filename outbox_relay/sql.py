"""Every statement of the relay: static text with parameters.

Snapshots travel as text, transaction ids as decimal text: Postgres' own types do the arithmetic.
"""

# What a session of the relay is like. A stopped process must lose its advisory lock: when idle
# through idle_session_timeout, in the middle of a result through the server's tcp_user_timeout (on
# a Unix socket nothing ends the latter). Sequential scans are off because a generic plan guesses
# that a third of the table is new, bitmap scans because a partition without statistics would be
# read to its end and sorted for each chunk; `local` is enough to know that our own server won't
# take a row back.
SESSION_OPTIONS = (
    "-c idle_session_timeout=5s"
    " -c idle_in_transaction_session_timeout=5s"
    " -c statement_timeout=30s"
    " -c lock_timeout=5s"
    " -c tcp_user_timeout=10s"
    " -c synchronous_commit=local"
    " -c enable_seqscan=off"
    " -c enable_bitmapscan=off"
    " -c jit=off"
    " -c work_mem=32MB"
    " -c default_transaction_isolation=read\\ committed"
    " -c search_path=public"
    " -c timezone=UTC"
)

IDENTITY = """
SELECT pg_is_in_recovery() AS in_recovery,
       (pg_control_system()).system_identifier AS system_identifier,
       (SELECT oid FROM pg_database WHERE datname = current_database()) AS database_oid
"""

# Of a primary only: both functions fail in recovery. pg_control_checkpoint() would tell an old
# timeline until the first checkpoint after a promotion.
POSITION = """
SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8) AS timeline,
       pg_current_wal_insert_lsn()::text AS wal_lsn,
       pg_current_snapshot()::text AS snapshot
"""

OUTBOX_IDENTITY_CACHE = """
SELECT seqcache FROM pg_sequence
WHERE seqrelid = pg_get_serial_sequence('public.outbox', 'id')::regclass
"""

# --- Leadership and cursor ---------------------------------------------------------------------

TRY_LEADERSHIP = "SELECT pg_try_advisory_lock(hashtextextended('outbox-relay:' || %(name)s, 0))"

# Standbys share a lock while they are fit to lead, so that a leader knows whether to give way.
TRY_STANDBY = """
SELECT pg_try_advisory_lock_shared(hashtextextended('outbox-relay:standby:' || %(name)s, 0))
"""
END_STANDBY = """
SELECT pg_advisory_unlock_shared(hashtextextended('outbox-relay:standby:' || %(name)s, 0))
"""

CALL_ITSELF = "SELECT set_config('application_name', 'outbox-relay ' || %(purpose)s, false)"

HOLDS_LEADERSHIP = """
SELECT count(*) FROM pg_locks,
       LATERAL (SELECT hashtextextended('outbox-relay:' || %(name)s, 0) AS key) AS wanted
WHERE locktype = 'advisory' AND objsubid = 1 AND granted
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (classid::bigint << 32 | objid::bigint) = wanted.key
"""

# One that the outbox doesn't take any more still has a cursor, which keeps its last events and the
# outbox's partitions until it has passed them.
TOPICS = """
SELECT topic FROM outbox_topics
UNION SELECT topic FROM outbox_relay_cursor WHERE relay_name = %(name)s
ORDER BY topic
"""

# Every topic's row gets the term's number: whoever led before can't move any of them.
BEGIN_TERM = """
UPDATE outbox_relay_cursor
SET leader = %(leader)s, leader_epoch = 1 + (
    SELECT max(leader_epoch) FROM outbox_relay_cursor WHERE relay_name = %(name)s)
WHERE relay_name = %(name)s
RETURNING leader_epoch
"""

CREATE_CURSOR = """
INSERT INTO outbox_relay_cursor (relay_name, topic, delivery, leader_epoch, leader,
    published_snapshot, system_identifier, database_oid, timeline, wal_lsn)
VALUES (%(name)s, %(topic)s, %(delivery)s, %(epoch)s, %(leader)s,
    %(published_snapshot)s::pg_snapshot, %(system_identifier)s, %(database_oid)s, %(timeline)s,
    %(wal_lsn)s::pg_lsn)
ON CONFLICT (relay_name, topic) DO NOTHING
"""

LOAD_CURSORS = """
SELECT topic, delivery, leader_epoch, leader, generation, sequence, published_snapshot::text,
       batch_snapshot::text, batch_last_id, system_identifier,
       database_oid::bigint AS database_oid, timeline, wal_lsn::text, kafka_cluster_id,
       published_rows, updated_at
FROM outbox_relay_cursor
WHERE relay_name = %(name)s AND topic = coalesce(%(topic)s::text, topic)
ORDER BY topic
"""

# Compare-and-swap: a leader that lost its lock without noticing changes nothing. Where it needn't
# survive a crash (an older cursor repeats events, which at_least_once may do) nobody waits for the
# disk: set_config() is local to this statement's own transaction.
SAVE_CURSOR = """
UPDATE outbox_relay_cursor
SET delivery = %(delivery)s,
    generation = %(generation)s,
    sequence = %(sequence)s,
    published_snapshot = %(published_snapshot)s::pg_snapshot,
    batch_snapshot = %(batch_snapshot)s::pg_snapshot,
    batch_last_id = %(batch_last_id)s,
    system_identifier = %(system_identifier)s,
    database_oid = %(database_oid)s,
    timeline = %(timeline)s,
    wal_lsn = %(wal_lsn)s::pg_lsn,
    kafka_cluster_id = %(kafka_cluster_id)s,
    published_rows = %(published_rows)s,
    updated_at = clock_timestamp()
FROM (SELECT set_config('synchronous_commit', %(synchronous_commit)s, true)) AS this_transaction
WHERE relay_name = %(name)s AND topic = %(topic)s AND leader_epoch = %(epoch)s
  AND (generation, sequence) = (%(old_generation)s, %(old_sequence)s)
"""

# Whether this server has not come as far as a cursor: it was restored, or lost its end.
IS_BEHIND = """
SELECT %(wal_lsn)s::pg_lsn > pg_current_wal_insert_lsn()
    OR pg_snapshot_xmax(%(snapshot)s::pg_snapshot) > pg_snapshot_xmax(pg_current_snapshot())
"""

MAY_READ_HISTORY = "SELECT has_function_privilege('pg_read_file(text)', 'execute')"

# Where each earlier timeline was left.
TIMELINE_HISTORY = "SELECT pg_read_file('pg_wal/' || %(timeline)s || '.history')"

# Of a lane, which may wait for Kafka longer than a leader may be silent.
BE_PATIENT = "SELECT set_config('idle_session_timeout', '60s', false)"

# Of a lane, too: a read that takes longer is made in another way.
LIMIT_READS = "SELECT set_config('statement_timeout', '10s', false)"

SNAPSHOT = "SELECT pg_current_snapshot()::text"

# Which of the topics have rows that a snapshot has not seen: asked while lanes have nothing to do.
NEWS_MAX_ROWS = 1_000
NEWS = """
WITH snapshot AS MATERIALIZED (SELECT pg_current_snapshot() AS current)
SELECT topic, current::text, count(topic)
FROM snapshot LEFT JOIN LATERAL (
    SELECT topic FROM (
        SELECT topic FROM outbox
        WHERE transaction_id >= $1::xid8 AND transaction_id < pg_snapshot_xmax(current)
          AND topic = ANY ($3::text[])
        UNION ALL
        SELECT topic FROM outbox
        WHERE transaction_id = ANY ($2::xid8[]) AND topic = ANY ($3::text[])
    ) AS unseen LIMIT 1000
) AS bounded ON true
GROUP BY topic, current::text
"""

# --- Reading by snapshot difference ------------------------------------------------------------

# A small batch, all of it in one statement: what this statement sees and `published` did not.
# Not visible in a snapshot = its xmax or later, or in progress in it, so an index on
# transaction_id finds the rows, however far back their ids lie. The upper bound is for rows of a
# restored dump, whose ids lie in this server's future: they would be new in every batch for ever.
# MATERIALIZED and UNION ALL keep the planner from walking the primary key instead (ORDER BY id
# LIMIT n tempts it: 120 ms for 0.03). pg_column_size() does not read a value stored out of line, so
# the bound in bytes costs nothing.
# A crash of Postgres hands out again the transaction ids whose records had not reached the disk;
# a cursor made of this snapshot would then hide new rows. So the statement, where it has rows,
# becomes a transaction of its own with something to commit, which takes all before it to the disk.
READ_FRESH = """
WITH fresh AS MATERIALIZED (
    (
        SELECT id, key, payload, headers, created_at
        FROM outbox
        WHERE transaction_id >= %(xmax)s::xid8
          AND transaction_id < pg_snapshot_xmax(pg_current_snapshot())
          AND topic = %(topic)s
        UNION ALL
        SELECT id, key, payload, headers, created_at
        FROM outbox WHERE transaction_id = ANY (%(in_progress)s::xid8[]) AND topic = %(topic)s
    )
    LIMIT %(max_rows)s + 1
), measured AS (
    SELECT *, coalesce(
        sum(pg_column_size(payload) + pg_column_size(headers) + pg_column_size(key)) OVER (
            ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS bytes_before
    FROM fresh
), once AS MATERIALIZED (
    SELECT pg_current_snapshot()::text AS snapshot, pg_current_wal_insert_lsn()::text AS wal_lsn,
           CASE WHEN pg_current_wal_flush_lsn() < pg_current_wal_insert_lsn()
                THEN pg_logical_emit_message(true, 'outbox-relay', '') END AS flushed,
           count(*) AS batch_rows,
           extract(epoch FROM clock_timestamp() - min(created_at))::float8 AS oldest_age_s
    FROM fresh HAVING count(*) > 0
)
SELECT measured.id, key, payload, headers::text,
       CASE WHEN bytes_before = 0
            THEN ARRAY[snapshot, wal_lsn, batch_rows::text, oldest_age_s::text] END AS told_once
FROM measured LEFT JOIN once ON bytes_before = 0
WHERE bytes_before < %(max_bytes)s
ORDER BY measured.id
"""

# The start of a big batch: its snapshot and its first id, taken from the batch itself (an id may
# be drawn long before its transaction gets an xid). `id + 0` because min(id) would be planned as
# a walk of the primary key from the oldest row on.
BEGIN_BIG_BATCH = """
SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, min(first_id)
FROM (
    SELECT min(id + 0) AS first_id FROM outbox
    WHERE transaction_id >= %(xmax)s::xid8
      AND transaction_id < pg_snapshot_xmax(pg_current_snapshot()) AND topic = %(topic)s
    UNION ALL
    SELECT min(id + 0) FROM outbox
    WHERE transaction_id = ANY (%(in_progress)s::xid8[]) AND topic = %(topic)s
) AS both_parts
"""

BEGIN_WHOLE_OUTBOX = (
    "SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, 1::bigint"
)

# The next rows of a big batch, by id, with its snapshot fixed: the same rows after any restart.
# In windows of ids, so that a rare topic never waits for one walk past millions of others' rows,
# nor the end of a batch for one past all that is newer. How many rows make up `max_bytes` is told
# by the first of them: a window function over all would cost as much as reading them.
WINDOW_IDS = 100_000
READ_BIG_BATCH = """
WITH sample AS MATERIALIZED (
    SELECT id, created_at,
           pg_column_size(payload) + pg_column_size(headers) + pg_column_size(key) AS bytes
    FROM outbox
    WHERE id > %(after_id)s AND id <= %(window_end_id)s AND topic = %(topic)s
      AND NOT pg_visible_in_snapshot(transaction_id, %(published_snapshot)s::pg_snapshot)
      AND pg_visible_in_snapshot(transaction_id, %(batch_snapshot)s::pg_snapshot)
    ORDER BY id LIMIT 50
), once AS MATERIALIZED (
    SELECT min(id) AS first_id, 1 + %(max_bytes)s / avg(bytes)::integer AS fitting_rows,
           ARRAY[extract(epoch FROM clock_timestamp() - min(created_at))::text] AS told
    FROM sample
)
SELECT id, key, payload, headers::text,
       CASE WHEN id = (SELECT first_id FROM once) THEN (SELECT told FROM once) END AS told_once
FROM outbox
WHERE id >= (SELECT first_id FROM once) AND id <= %(window_end_id)s AND topic = %(topic)s
  AND NOT pg_visible_in_snapshot(transaction_id, %(published_snapshot)s::pg_snapshot)
  AND pg_visible_in_snapshot(transaction_id, %(batch_snapshot)s::pg_snapshot)
ORDER BY id
LIMIT (SELECT least(%(max_rows)s, fitting_rows) FROM once)
"""

NEXT_ID = "SELECT min(id) FROM outbox WHERE id > %(after_id)s"

# A newer position for a topic without rows behind its own, where other topics have some.
SKIP_OTHER_TOPICS = """
SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text
WHERE EXISTS (
    SELECT FROM outbox
    WHERE transaction_id >= %(xmax)s::xid8
      AND transaction_id < pg_snapshot_xmax(pg_current_snapshot())
    UNION ALL
    SELECT FROM outbox WHERE transaction_id = ANY (%(in_progress)s::xid8[])
) AND NOT EXISTS (
    SELECT FROM outbox
    WHERE transaction_id >= %(xmax)s::xid8
      AND transaction_id < pg_snapshot_xmax(pg_current_snapshot()) AND topic = %(topic)s
    UNION ALL
    SELECT FROM outbox
    WHERE transaction_id = ANY (%(in_progress)s::xid8[]) AND topic = %(topic)s
)
"""

# The same as in READ_FRESH, for where a snapshot is taken without rows.
FLUSH_WAL_TO = """
SELECT CASE WHEN pg_current_wal_flush_lsn() < %(wal_lsn)s::pg_lsn
            THEN pg_logical_emit_message(true, 'outbox-relay', '') END
"""

# --- Operators ---------------------------------------------------------------------------------

LAG = """
SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8,
       min(id + 0)
FROM outbox
WHERE topic = %(topic)s
  AND NOT pg_visible_in_snapshot(transaction_id, %(published_snapshot)s::pg_snapshot)
  AND NOT (
      %(batch_snapshot)s::pg_snapshot IS NOT NULL
      AND pg_visible_in_snapshot(transaction_id, %(batch_snapshot)s::pg_snapshot)
      AND id <= %(batch_last_id)s::bigint
  )
  AND (transaction_id >= %(xmax)s::xid8 OR transaction_id = ANY (%(in_progress)s::xid8[]))
"""

# The same for a gauge, which must not cost more the further the relay is behind: of each part of
# what may be unpublished (the batch under way, transactions open at its beginning, later ones) so
# many rows are looked at, whatever their topics. `newest` is the batch's snapshot where there is
# one, else the published one.
LAG_MAX_ROWS = 100_000
LAG_AT_LEAST = """
SELECT count(*), coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8
FROM (
    (SELECT topic, transaction_id, created_at FROM outbox
     WHERE id > %(batch_last_id)s::bigint
       AND pg_visible_in_snapshot(transaction_id, %(batch_snapshot)s::pg_snapshot)
     ORDER BY id LIMIT 100000)
    UNION ALL
    (SELECT topic, transaction_id, created_at FROM outbox
     WHERE transaction_id = ANY (%(in_progress)s::xid8[]) LIMIT 100000)
    UNION ALL
    (SELECT topic, transaction_id, created_at FROM outbox
     WHERE transaction_id >= %(xmax)s::xid8
       AND transaction_id < pg_snapshot_xmax(pg_current_snapshot())
     ORDER BY transaction_id LIMIT 100000)
) AS looked_at
WHERE topic = %(topic)s
  AND NOT pg_visible_in_snapshot(transaction_id, %(published_snapshot)s::pg_snapshot)
"""

RESUME_PREVIEW = """
SELECT count(*) FILTER (WHERE id >= %(from_id)s), count(*) FILTER (WHERE id < %(from_id)s),
       count(*) FILTER (WHERE id >= %(from_id)s
           AND pg_visible_in_snapshot(transaction_id, published_snapshot)),
       pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, max(id)
FROM outbox LEFT JOIN outbox_relay_cursor AS c ON c.topic = outbox.topic AND relay_name = %(name)s
WHERE outbox.topic = coalesce(%(topic)s::text, outbox.topic)
"""

# Everything before from_id that is committed now counts as published; rows of transactions still
# open now are in neither part and come with the next batch, whatever their ids. The new generation
# makes this cursor the one that counts, whatever Kafka has.
RESUME = """
UPDATE outbox_relay_cursor
SET leader_epoch = leader_epoch + 1, leader = '', delivery = %(delivery)s,
    generation = greatest(generation, %(generation)s) + 1, sequence = 0,
    published_snapshot = %(published_snapshot)s::pg_snapshot,
    batch_snapshot = %(batch_snapshot)s::pg_snapshot, batch_last_id = %(batch_last_id)s,
    system_identifier = %(system_identifier)s, database_oid = %(database_oid)s,
    timeline = %(timeline)s, wal_lsn = %(wal_lsn)s::pg_lsn, kafka_cluster_id = NULL,
    updated_at = clock_timestamp()
WHERE relay_name = %(name)s AND topic = coalesce(%(topic)s::text, topic)
"""

# --- Quarantine --------------------------------------------------------------------------------

QUARANTINED_KEYS = """
SELECT DISTINCT key FROM outbox_relay_quarantine
WHERE relay_name = %(name)s AND topic = %(topic)s
"""

# Copied from the outbox, whose partitions are dropped once they are behind the cursor.
QUARANTINE = """
INSERT INTO outbox_relay_quarantine (relay_name, id, topic, key, payload, headers, error)
SELECT %(name)s, id, topic, key, payload, headers, %(error)s
FROM outbox WHERE id = ANY (%(ids)s)
ON CONFLICT (relay_name, id) DO NOTHING
"""

# What may be tried: of each key the first one, when an operator released it, or what was never
# refused itself, up to the next that was. Who was refused once goes alone: nothing of its key is
# to pass it should it be refused again.
QUARANTINE_READY = """
SELECT id, key, payload, headers::text, NULL::text[] FROM (
    SELECT id, key, payload, headers, coalesce(
        sum(pg_column_size(payload) + pg_column_size(headers)) OVER (
            ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS bytes_before
    FROM (
        SELECT *, bool_or(error IS NOT NULL) OVER (
            PARTITION BY key ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS behind_a_refused_one
        FROM outbox_relay_quarantine WHERE relay_name = %(name)s AND topic = %(topic)s
    ) AS waiting
    WHERE behind_a_refused_one IS NOT TRUE AND (error IS NULL OR released_at IS NOT NULL)
    ORDER BY id LIMIT %(max_rows)s
) AS ready
WHERE bytes_before < %(max_bytes)s ORDER BY id
"""

QUARANTINE_REFUSED = """
UPDATE outbox_relay_quarantine SET error = %(error)s, released_at = NULL
WHERE relay_name = %(name)s AND id = %(id)s
"""

QUARANTINE_PUBLISHED = """
DELETE FROM outbox_relay_quarantine WHERE relay_name = %(name)s AND id = ANY (%(ids)s)
"""

QUARANTINE_LIST = """
SELECT id, topic, key, error, quarantined_at, released_at,
       octet_length(key) + octet_length(payload::text) + octet_length(headers::text) AS bytes
FROM outbox_relay_quarantine WHERE relay_name = %(name)s ORDER BY id LIMIT %(max_rows)s
"""

QUARANTINE_COUNT = """
SELECT t.topic, count(q.id) FROM outbox_topics AS t
LEFT JOIN outbox_relay_quarantine AS q ON q.topic = t.topic AND q.relay_name = %(name)s
GROUP BY t.topic
"""

QUARANTINE_RELEASE = """
UPDATE outbox_relay_quarantine
SET released_at = CASE WHEN error IS NOT NULL THEN coalesce(released_at, clock_timestamp()) END
WHERE relay_name = %(name)s AND id = %(id)s
RETURNING error IS NULL AS only_waits
"""

# --- Doctor ------------------------------------------------------------------------------------

# Asked through a pooler, the server tells another pid than the one that was told at the start; and
# only options that reached the server are a setting's source.
SESSION = """
SELECT pg_backend_pid() AS pid, EXISTS (
    SELECT FROM pg_settings WHERE name = 'idle_session_timeout' AND source = 'client'
) AS has_our_options
"""

LIMIT_EXAMINATION = (
    "SELECT set_config('statement_timeout', '3s', false), set_config('lock_timeout', '1s', false)"
)

SERVER = """
SELECT pg_is_in_recovery() AS in_recovery,
       extract(epoch FROM clock_timestamp())::float8 AS clock_s,
       current_setting('fsync')::boolean AS fsync,
       current_setting('full_page_writes')::boolean AS full_page_writes
"""

REVISION = "SELECT max(version_num) AS revision FROM alembic_version"

ALLOWED_BYTES = "SELECT topic, max_bytes FROM outbox_topics ORDER BY topic"

# Transactions that have written to the outbox, or may have: they hold the lock of an INSERT on it
# or a partition of it, and an xid. The age of others' transactions is hidden from a role without
# pg_read_all_stats; but a row of a later xid is younger than our transaction's first write.
WRITERS = """
WITH tables AS (
    SELECT 'public.outbox'::regclass::oid AS oid
    UNION SELECT relid FROM pg_partition_tree('public.outbox')
), writers AS (
    SELECT DISTINCT pid, virtualtransaction FROM pg_locks
    WHERE locktype = 'relation' AND relation IN (SELECT oid FROM tables)
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND mode = 'RowExclusiveLock' AND granted AND pid IS DISTINCT FROM pg_backend_pid()
)
SELECT activity.pid, prepared.gid, coalesce(activity.usename, prepared.owner) AS role,
       activity.application_name, activity.state, activity.wait_event, activity.query,
       extract(epoch FROM clock_timestamp() - activity.query_start)::float8 AS query_age_s,
       held.transactionid::text AS xid,
       extract(epoch FROM clock_timestamp() - coalesce(
           activity.xact_start, prepared.prepared,
           (SELECT created_at FROM outbox
            WHERE transaction_id > (newest - ((newest - held.transactionid::text::bigint)
                                              & 4294967295))::text::xid8
            ORDER BY transaction_id LIMIT 1)))::float8 AS age_s
FROM writers
JOIN pg_locks AS held USING (virtualtransaction)
LEFT JOIN pg_stat_activity AS activity ON activity.pid = writers.pid
LEFT JOIN pg_prepared_xacts AS prepared ON prepared.transaction = held.transactionid,
LATERAL (SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS newest) AS now
WHERE held.locktype = 'transactionid' AND held.mode = 'ExclusiveLock' AND held.granted
  AND held.transactionid IN (activity.backend_xid, prepared.transaction)
ORDER BY age_s DESC NULLS LAST LIMIT 20
"""

WAIT_A_SECOND = "SELECT pg_sleep(1)"

# A role's own setting comes before its database's, and that before the server's.
WRITERS_COMMIT = """
SELECT rolname AS role, coalesce(set_for.value, %(of_server)s) AS value,
       current_setting('synchronous_standby_names') <> '' AS has_standbys
FROM pg_roles
LEFT JOIN LATERAL (
    SELECT split_part(entry, '=', 2) AS value
    FROM pg_db_role_setting, unnest(setconfig) AS entry
    WHERE entry LIKE 'synchronous_commit=%%' AND setrole IN (0, pg_roles.oid)
      AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
    ORDER BY setrole <> 0 DESC, setdatabase <> 0 DESC LIMIT 1
) AS set_for ON true
WHERE rolcanlogin AND NOT rolsuper
  AND has_any_column_privilege(pg_roles.oid, 'public.outbox', 'INSERT')
ORDER BY rolname
"""

# In a session without SESSION_OPTIONS, which hide it.
SERVER_COMMIT = """
SELECT CASE WHEN source LIKE '%%user' THEN 'on' ELSE setting END AS value
FROM pg_settings WHERE name = 'synchronous_commit'
"""

CONNECTION_LIMITS = """
WITH sessions AS (
    SELECT datname, usename FROM pg_stat_activity WHERE datid IS NOT NULL AND usesysid IS NOT NULL
)
SELECT 'the server (max_connections)' AS whose, (SELECT count(*) FROM sessions) AS used,
       current_setting('max_connections')::integer
       - current_setting('superuser_reserved_connections')::integer
       - coalesce(current_setting('reserved_connections', true)::integer, 0) AS allowed
UNION ALL
SELECT 'the role ' || rolname, (SELECT count(*) FROM sessions WHERE usename = rolname), rolconnlimit
FROM pg_roles WHERE rolname = current_user AND rolconnlimit >= 0
UNION ALL
SELECT 'the database ' || database.datname,
       (SELECT count(*) FROM sessions WHERE sessions.datname = database.datname), datconnlimit
FROM pg_database AS database WHERE datname = current_database() AND datconnlimit >= 0
"""

# A row is never visible before its transaction has ended, so these are of another server.
FUTURE_ROWS = """
SELECT count(*) AS rows, min(id) AS first_id FROM (
    SELECT id FROM outbox
    WHERE transaction_id >= pg_snapshot_xmax(pg_current_snapshot()) LIMIT 100001
) AS future
"""

DEFAULT_PARTITION_ROWS = """
SELECT count(*) AS rows, min(id) AS first_id FROM (
    SELECT id FROM outbox_default LIMIT 100001
) AS beyond
"""

QUARANTINED = """
SELECT topic, count(*) AS events, min(id) AS first_id,
       count(*) FILTER (WHERE error IS NOT NULL) AS refused
FROM outbox_relay_quarantine WHERE relay_name = %(name)s GROUP BY topic ORDER BY topic
"""

# About the oldest event of each topic that is committed and unpublished, by index alone: of the
# batch under way, of transactions that were open when it began, of later ones.
UNPUBLISHED = """
SELECT outbox_topics.topic, extract(epoch FROM clock_timestamp() - least(
    (SELECT created_at FROM outbox
     WHERE outbox.topic = outbox_topics.topic AND id > batch_last_id
       AND NOT pg_visible_in_snapshot(transaction_id, published)
       AND pg_visible_in_snapshot(transaction_id, batch_snapshot)
     ORDER BY id LIMIT 1),
    (SELECT min(created_at) FROM outbox
     WHERE outbox.topic = outbox_topics.topic
       AND transaction_id = ANY (ARRAY(SELECT pg_snapshot_xip(newest)))),
    (SELECT created_at FROM outbox
     WHERE outbox.topic = outbox_topics.topic AND transaction_id >= pg_snapshot_xmax(newest)
       AND transaction_id < pg_snapshot_xmax(pg_current_snapshot())
     ORDER BY transaction_id LIMIT 1)))::float8 AS age_s
FROM outbox_topics
LEFT JOIN outbox_relay_cursor AS stored
    ON stored.topic = outbox_topics.topic AND relay_name = %(name)s,
LATERAL (SELECT coalesce(published_snapshot, '3:3:') AS published,
                coalesce(batch_snapshot, published_snapshot, '3:3:') AS newest) AS snapshots
ORDER BY outbox_topics.topic
"""

# Cursors that retention waits for and that nobody seems to move: of other relays, and of topics
# that the outbox takes no more. Also those that another relay has not got at all.
HOLD_RETENTION = """
SELECT relay_name, topic, extract(epoch FROM clock_timestamp() - updated_at)::float8 AS idle_s
FROM outbox_relay_cursor
WHERE (relay_name <> %(name)s OR topic NOT IN (SELECT topic FROM outbox_topics))
  AND updated_at < clock_timestamp() - make_interval(secs => %(idle_s)s)
  AND (EXISTS (SELECT FROM outbox
           WHERE transaction_id >= pg_snapshot_xmax(published_snapshot)
             AND transaction_id < pg_snapshot_xmax(pg_current_snapshot()))
       OR EXISTS (SELECT FROM outbox WHERE transaction_id = ANY (
           ARRAY(SELECT pg_snapshot_xip(published_snapshot)))))
UNION ALL
SELECT relay_name, topic, NULL FROM (
    SELECT names.relay_name, outbox_topics.topic
    FROM outbox_topics, (SELECT DISTINCT relay_name FROM outbox_relay_cursor) AS names
    WHERE names.relay_name <> %(name)s
    EXCEPT SELECT relay_name, topic FROM outbox_relay_cursor
) AS missing
ORDER BY relay_name, topic LIMIT 20
"""

# Relays that stand by; those that can reach Kafka share a lock.
STANDBYS = """
SELECT pid, coalesce(client_addr::text, 'this machine') AS address, EXISTS (
    SELECT FROM pg_locks WHERE pg_locks.pid = activity.pid AND locktype = 'advisory'
      AND mode = 'ShareLock' AND granted) AS fit
FROM pg_stat_activity AS activity
WHERE datname = current_database() AND application_name = 'outbox-relay standby'
  AND backend_start < clock_timestamp() - interval '10 s'
ORDER BY pid
"""

# --- Retention -----------------------------------------------------------------------------------

# Every partition of the outbox with its first and last row; the default one has no number. Asked of
# the parent, which the relay may read, by bounds that leave one partition to look into. One that is
# dropped meanwhile has no size.
PARTITIONS = """
SELECT p.number, coalesce(pg_relation_size(relation), 0) > 0 AS filled,
       coalesce(pg_total_relation_size(relation), 0) AS size_bytes,
       last_value / 10000000000 AS in_use,
       coalesce(newest.id - oldest.id + 1, 0) AS ids,
       extract(epoch FROM clock_timestamp() - oldest.created_at)::float8 AS oldest_age_s,
       extract(epoch FROM clock_timestamp() - newest.created_at)::float8 AS newest_age_s
FROM outbox_id_seq, outbox_partitions AS p
LEFT JOIN LATERAL (
    SELECT id, created_at FROM outbox
    WHERE id >= p.number * 10000000000 AND id < (p.number + 1) * 10000000000
    ORDER BY id LIMIT 1
) AS oldest ON true
LEFT JOIN LATERAL (
    SELECT id, created_at FROM outbox
    WHERE id >= p.number * 10000000000 AND id < (p.number + 1) * 10000000000
    ORDER BY id DESC LIMIT 1
) AS newest ON true
UNION ALL
SELECT NULL, pg_relation_size('outbox_default') > 0, pg_total_relation_size('outbox_default'),
       last_value / 10000000000, coalesce(newest.id - oldest.id + 1, 0),
       extract(epoch FROM clock_timestamp() - oldest.created_at)::float8,
       extract(epoch FROM clock_timestamp() - newest.created_at)::float8
FROM outbox_id_seq
LEFT JOIN (SELECT id, created_at FROM outbox_default ORDER BY id LIMIT 1) AS oldest ON true
LEFT JOIN (SELECT id, created_at FROM outbox_default ORDER BY id DESC LIMIT 1) AS newest ON true
ORDER BY number
"""

# Who holds a lock on a table, told apart by transaction.
HOLDERS = """
SELECT virtualtransaction, coalesce('process ' || pid, 'a prepared transaction') FROM pg_locks
WHERE locktype = 'relation' AND relation = to_regclass(%(relation)s) AND granted
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND pid IS DISTINCT FROM pg_backend_pid()
"""

# What the owner lets the relay do to partitions: see the migration.
ADD_PARTITION = "SELECT outbox_add_partition()"
FENCE_DEFAULT = "SELECT outbox_fence_default()"
ROLL_OVER = "SELECT outbox_roll_over(%(in_use)s::bigint)"
KEPT_FOR = "SELECT outbox_kept_for(%(number)s::bigint)"
EMPTY_PARTITION = "SELECT outbox_empty_partition(%(number)s::bigint)"
DROP_PARTITION = "SELECT outbox_drop_partition(%(number)s::bigint)"
