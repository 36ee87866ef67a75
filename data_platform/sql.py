"""Every statement of the data platform: static text with parameters.

Order in a load: the offset rows in order, facts, current state, seats, dimensions, dead letters,
offsets.
"""

# For reservations that are there already; one per connection, emptied by each commit and rollback.
CREATE_STAGE = """
CREATE TEMPORARY TABLE incoming_reservations (
    reservation_id text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    status text NOT NULL,
    customer_id text NOT NULL,
    concert_id bigint NOT NULL,
    performance_id bigint NOT NULL,
    seat_count integer NOT NULL,
    amount bigint NOT NULL,
    currency text NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    expires_at timestamptz,
    seats_version integer NOT NULL,
    seats_digest bigint NOT NULL,
    created_on date NOT NULL
) ON COMMIT DELETE ROWS
"""

# The first twelve columns of these three are one text (events.ReservationEvent.state).
COPY_EVENTS = """
COPY analytics.fct_reservation_events (
    reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, occurred_at, expires_at, event_type, occurred_on, kafka_partition,
    kafka_offset
) FROM STDIN
"""

COPY_RESERVATIONS = """
COPY analytics.fct_reservations (
    reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, updated_at, expires_at, seats_version, seats_digest, created_on
) FROM STDIN
"""

STAGE = """
COPY pg_temp.incoming_reservations (
    reservation_id, version, status, customer_id, concert_id, performance_id, seat_count, amount,
    currency, created_at, updated_at, expires_at, seats_version, seats_digest, created_on
) FROM STDIN
"""

COPY_SEATS = """
COPY analytics.fct_reservation_seats (
    reservation_id, seat_id, performance_id, section, "row", number, price, currency, version
) FROM STDIN
"""

# In one transaction several pieces may be staged one after the other.
UNSTAGE = "DELETE FROM pg_temp.incoming_reservations"

# The version decides, also against a worker that loads the same reservation meanwhile: Postgres
# looks again at a row it had to wait for. So does the digest of the seats, which tells whether
# they have to be written.
UPDATE_RESERVATIONS = """
WITH moved AS (
    UPDATE analytics.fct_reservations AS stored SET
        version = incoming.version,
        status = incoming.status,
        customer_id = incoming.customer_id,
        concert_id = incoming.concert_id,
        performance_id = incoming.performance_id,
        seat_count = incoming.seat_count,
        amount = incoming.amount,
        currency = incoming.currency,
        created_at = incoming.created_at,
        updated_at = incoming.updated_at,
        expires_at = incoming.expires_at,
        loaded_at = now(),
        seats_version = CASE
            WHEN stored.seats_digest = incoming.seats_digest THEN stored.seats_version
            ELSE incoming.seats_version
        END,
        seats_digest = incoming.seats_digest,
        created_on = incoming.created_on
    FROM pg_temp.incoming_reservations AS incoming
    WHERE stored.reservation_id = incoming.reservation_id AND stored.version < incoming.version
    RETURNING stored.reservation_id, stored.seats_version = incoming.seats_version AS has_new_seats
)
SELECT count(*), coalesce(array_agg(reservation_id) FILTER (WHERE has_new_seats), '{}') FROM moved
"""

DELETE_SEATS = """
DELETE FROM analytics.fct_reservation_seats WHERE reservation_id = ANY (%(reservation_ids)s)
"""

KNOWN_EVENTS = """
SELECT reservation_id || ':' || version FROM analytics.fct_reservation_events
WHERE (reservation_id, version) IN (
    SELECT * FROM unnest(%(reservation_ids)s::text[], %(versions)s::integer[])
)
"""

KNOWN_RESERVATIONS = """
SELECT reservation_id, version FROM analytics.fct_reservations
WHERE reservation_id = ANY (%(reservation_ids)s)
"""

# What reservations tell of a concert and a performance until the catalogue does: version 0.
INFER_CONCERTS = """
INSERT INTO analytics.dim_concerts (concert_id, version, title, venue, time_zone)
SELECT concert_id, 0, title, venue, time_zone
FROM unnest(
    %(concert_ids)s::bigint[], %(titles)s::text[], %(venues)s::text[], %(time_zones)s::text[]
) AS told (concert_id, title, venue, time_zone)
WHERE NOT EXISTS (
    SELECT FROM analytics.dim_concerts AS known WHERE known.concert_id = told.concert_id
)
ORDER BY concert_id
ON CONFLICT (concert_id) DO NOTHING
"""

INFER_PERFORMANCES = """
INSERT INTO analytics.dim_performances (
    performance_id, concert_id, version, starts_at, time_zone
)
SELECT performance_id, concert_id, 0, starts_at, time_zone
FROM unnest(
    %(performance_ids)s::bigint[], %(concert_ids)s::bigint[], %(starts_at)s::timestamptz[],
    %(time_zones)s::text[]
) AS told (performance_id, concert_id, starts_at, time_zone)
WHERE NOT EXISTS (
    SELECT FROM analytics.dim_performances AS known
    WHERE known.performance_id = told.performance_id
)
ORDER BY performance_id
ON CONFLICT (performance_id) DO NOTHING
"""

UPSERT_CONCERT = """
INSERT INTO analytics.dim_concerts AS stored (
    concert_id, version, title, venue, time_zone, currency, occurred_at
)
VALUES (
    %(concert_id)s, %(version)s, %(title)s, %(venue)s, %(time_zone)s, %(currency)s, %(occurred_at)s
)
ON CONFLICT (concert_id) DO UPDATE SET
    version = excluded.version,
    title = excluded.title,
    venue = excluded.venue,
    time_zone = excluded.time_zone,
    currency = excluded.currency,
    occurred_at = excluded.occurred_at,
    loaded_at = now()
WHERE stored.version < excluded.version
"""

UPSERT_PERFORMANCE = """
INSERT INTO analytics.dim_performances AS stored (
    performance_id, concert_id, version, starts_at, sales_open_at, sales_close_at, status, capacity,
    time_zone, occurred_at
)
VALUES (
    %(performance_id)s, %(concert_id)s, %(version)s, %(starts_at)s, %(sales_open_at)s,
    %(sales_close_at)s, %(status)s, %(capacity)s, %(time_zone)s, %(occurred_at)s
)
ON CONFLICT (performance_id) DO UPDATE SET
    concert_id = excluded.concert_id,
    version = excluded.version,
    starts_at = excluded.starts_at,
    sales_open_at = excluded.sales_open_at,
    sales_close_at = excluded.sales_close_at,
    status = excluded.status,
    capacity = excluded.capacity,
    time_zone = excluded.time_zone,
    occurred_at = excluded.occurred_at,
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

READ_ALL_OFFSETS = """
SELECT topic, kafka_partition, next_offset, topic_id FROM analytics.load_offsets
ORDER BY topic, kafka_partition
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

# What stands there was locked and compared before (LOCK_OFFSETS). One event that says it happened
# in the year 9999 must not hide for ever that nothing comes any more: never later than now.
MOVE_OFFSETS = """
UPDATE analytics.load_offsets AS stored SET
    next_offset = moved.next_offset,
    last_event_at = CASE
        WHEN greatest(stored.last_event_at, moved.last_event_at) > now() THEN now()
        ELSE greatest(stored.last_event_at, moved.last_event_at)
    END,
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
# locks after 2 s. A commit doesn't wait for the disk: rows and offsets are one transaction, so what
# a crash of the server takes back is read from Kafka again. No batch is worth a scan of a large
# table, or a compiler: plans stay on the indexes, whatever statistics or a plan made early say.
SESSION = """
SELECT
    set_config('idle_in_transaction_session_timeout', '2s', false),
    set_config('lock_timeout', '2s', false),
    set_config('statement_timeout', '15s', false),
    set_config('timezone', 'UTC', false),
    set_config('synchronous_commit', 'off', false),
    set_config('enable_hashjoin', 'off', false),
    set_config('enable_mergejoin', 'off', false),
    set_config('enable_seqscan', 'off', false),
    set_config('jit', 'off', false)
"""

STATUS_SESSION = "SELECT set_config('statement_timeout', '15s', false)"
