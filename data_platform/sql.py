"""Every statement of the data platform: static text with parameters.

Order in a load: COPY into the temporary table (no shared lock yet), the offset rows in order,
facts, current state, dead letters, offsets.
"""

# One per connection; emptied by each commit and rollback.
CREATE_STAGE = """
CREATE TEMPORARY TABLE incoming_reservation_events (
    reservation_id text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    event_type text NOT NULL,
    occurred_at timestamptz NOT NULL,
    status text NOT NULL,
    customer_id text NOT NULL,
    concert_id bigint NOT NULL,
    performance_id bigint NOT NULL,
    seat_count integer NOT NULL,
    amount bigint NOT NULL,
    currency text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    kafka_partition integer NOT NULL,
    kafka_offset bigint NOT NULL
) ON COMMIT DELETE ROWS
"""

STAGE = """
COPY pg_temp.incoming_reservation_events (
    reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, amount, currency, created_at, expires_at, kafka_partition,
    kafka_offset
) FROM STDIN
"""

# A bisected piece stages its halves one after the other in one transaction.
UNSTAGE = "DELETE FROM pg_temp.incoming_reservation_events"

# Sorted, so that two loaders that meet (a key in two partitions) wait for each other and never in
# a circle. Of two records with one event the first in Kafka's order is told as its origin.
INSERT_EVENTS = """
INSERT INTO analytics.fct_reservation_events (
    reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, amount, currency, created_at, expires_at, kafka_partition,
    kafka_offset
)
SELECT DISTINCT ON (reservation_id, version)
    reservation_id, version, event_type, occurred_at, status, customer_id, concert_id,
    performance_id, seat_count, amount, currency, created_at, expires_at, kafka_partition,
    kafka_offset
FROM pg_temp.incoming_reservation_events
ORDER BY reservation_id, version, kafka_partition, kafka_offset
ON CONFLICT (reservation_id, version) DO NOTHING
"""

# The anti-join first: an upsert locks the row even where its WHERE is false, so a stale event
# would make its loader wait for whoever works on that reservation. The WHERE stays for the one
# who loaded a newer version since. DISTINCT ON also keeps the plan on the index: Postgres expects
# few groups of a table without statistics, and would else read all of a large table per batch.
UPSERT_RESERVATIONS = """
WITH latest AS (
    SELECT DISTINCT ON (reservation_id) *
    FROM pg_temp.incoming_reservation_events
    ORDER BY reservation_id, version DESC, kafka_partition, kafka_offset
)
INSERT INTO analytics.fct_reservations AS stored (
    reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, updated_at, expires_at
)
SELECT
    reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, occurred_at, expires_at
FROM latest
WHERE NOT EXISTS (
    SELECT FROM analytics.fct_reservations AS known
    WHERE known.reservation_id = latest.reservation_id AND known.version >= latest.version
)
ORDER BY reservation_id
ON CONFLICT (reservation_id) DO UPDATE SET
    version = excluded.version,
    status = excluded.status,
    customer_id = excluded.customer_id,
    concert_id = excluded.concert_id,
    performance_id = excluded.performance_id,
    seat_count = excluded.seat_count,
    amount = excluded.amount,
    currency = excluded.currency,
    created_at = excluded.created_at,
    updated_at = excluded.updated_at,
    expires_at = excluded.expires_at,
    loaded_at = now()
WHERE stored.version < excluded.version
"""

# A partition that is met for the first time begins at 0. (DO UPDATE would lock the row even where
# its WHERE is false: a frozen worker that holds it would keep everybody from claiming it.)
CLAIM_OFFSET = """
INSERT INTO analytics.load_offsets (topic, kafka_partition, next_offset, topic_id)
VALUES (%(topic)s, %(kafka_partition)s, 0, %(topic_id)s)
ON CONFLICT (topic, kafka_partition) DO NOTHING
"""

# A row that never moved takes the id of a topic made anew: nothing was loaded from the old one.
ADOPT_TOPIC = """
UPDATE analytics.load_offsets SET topic_id = %(topic_id)s
WHERE topic = %(topic)s AND next_offset = 0 AND topic_id <> %(topic_id)s
    AND kafka_partition = ANY (%(partitions)s)
"""

READ_OFFSETS = """
SELECT kafka_partition, next_offset, topic_id, last_event_at
FROM analytics.load_offsets
WHERE topic = %(topic)s
ORDER BY kafka_partition
"""

LOCK_OFFSETS = """
SELECT topic, kafka_partition, next_offset, topic_id
FROM analytics.load_offsets
WHERE (topic, kafka_partition) IN (
    SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::integer[])
)
ORDER BY topic, kafka_partition
FOR UPDATE
"""

# What stands there was locked and compared before (LOCK_OFFSETS).
MOVE_OFFSETS = """
UPDATE analytics.load_offsets AS stored SET
    next_offset = moved.next_offset,
    last_event_at = greatest(stored.last_event_at, moved.last_event_at),
    updated_at = now()
FROM unnest(
    %(topics)s::text[], %(partitions)s::integer[], %(next_offsets)s::bigint[],
    %(last_events_at)s::timestamptz[]
) AS moved (topic, kafka_partition, next_offset, last_event_at)
WHERE stored.topic = moved.topic AND stored.kafka_partition = moved.kafka_partition
"""

INSERT_DEAD_LETTER = """
INSERT INTO analytics.dead_letters (
    topic, kafka_partition, kafka_offset, raw_key, raw_value, raw_headers, reason, error
)
VALUES (
    %(topic)s, %(kafka_partition)s, %(kafka_offset)s, %(raw_key)s, %(raw_value)s,
    %(raw_headers)s, %(reason)s, %(error)s
)
ON CONFLICT (topic, kafka_partition, kafka_offset) DO NOTHING
"""

# Whoever has locked our offset rows is in xmax. Only a loader like us, and only one that has been
# at it for longer than anybody healthy waits.
END_BLOCKERS = """
SELECT activity.pid, pg_terminate_backend(activity.pid) AS ended
FROM pg_stat_activity AS activity
WHERE activity.datname = current_database()
    AND activity.usename = current_user
    AND activity.application_name = current_setting('application_name')
    AND activity.pid <> pg_backend_pid()
    AND activity.xact_start < clock_timestamp() - interval '2 seconds'
    AND activity.backend_xid IN (
        SELECT xmax FROM analytics.load_offsets
        WHERE (topic, kafka_partition) IN (
            SELECT * FROM unnest(%(topics)s::text[], %(partitions)s::integer[])
        )
    )
"""

COUNT_DEAD_LETTERS = "SELECT count(*) FROM analytics.dead_letters"

# For each connection of the loader. A worker that freezes between two statements lets go of its
# locks after 2 s.
SESSION = """
SELECT
    set_config('idle_in_transaction_session_timeout', '2s', false),
    set_config('lock_timeout', '2s', false),
    set_config('statement_timeout', '15s', false),
    set_config('timezone', 'UTC', false)
"""

STATUS_SESSION = "SELECT set_config('statement_timeout', '15s', false)"
