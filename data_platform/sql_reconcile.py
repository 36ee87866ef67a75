"""The statements of `reconcile`: static text with parameters; none of them writes a lasting row.

Both databases make the same text of the same row; what is compared are sums of such texts' hashes,
and only where they differ the rows. Should two servers' hashes differ, everything is compared row
by row: slower, and no less right.
"""

# Texts of times must not depend on a role's settings. No transaction of the service's is held up.
SESSION = """
SELECT
    set_config('timezone', 'UTC', false),
    set_config('datestyle', 'ISO', false),
    set_config('statement_timeout', '30min', false),
    set_config('lock_timeout', '5s', false),
    set_config('idle_in_transaction_session_timeout', '60s', false),
    set_config('work_mem', '32MB', false),
    set_config('jit', 'off', false)
"""

# ---- the reservation service's database

# As many reservations as a range has, from a place on, in the order of their ids.
SERVICE_RANGE = """
WITH part AS MATERIALIZED (
    SELECT reservation_id::text AS id, version, concat_ws('|', reservation_id, version, status,
        customer_id, performance_id, amount, currency, created_at, updated_at, expires_at) AS told,
        reservation_id
    FROM reservations
    WHERE %(after)s::uuid IS NULL OR reservation_id > %(after)s::uuid
    ORDER BY reservation_id
    LIMIT %(limit)s
)
SELECT
    max(id COLLATE "C"), count(*), coalesce(sum(hashtextextended(told, 0)), 0),
    (SELECT coalesce(sum(hashtextextended(id || ':' || number, 0)), 0)
        FROM part, generate_series(1, version) AS number),
    (SELECT coalesce(sum(hashtextextended(concat_ws('|', seat.reservation_id, seat_id, section,
            "row", number, price), 0)), 0)
        FROM part JOIN reservation_seats AS seat USING (reservation_id))
FROM part
"""

SERVICE_ROWS = """
SELECT reservation_id::text, jsonb_build_object('version', version, 'status', status,
    'customer_id', customer_id, 'performance_id', performance_id, 'amount', amount,
    'currency', currency, 'created_at', created_at, 'updated_at', updated_at,
    'expires_at', expires_at, 'seats', (
        SELECT jsonb_agg(jsonb_build_array(seat_id, section, "row", number, price)
            ORDER BY seat_id)
        FROM reservation_seats AS seat WHERE seat.reservation_id = reservations.reservation_id))
FROM reservations
WHERE (%(after)s::uuid IS NULL OR reservation_id > %(after)s::uuid)
    AND (%(until)s::uuid IS NULL OR reservation_id <= %(until)s::uuid)
    AND (%(ids)s::uuid[] IS NULL OR reservation_id = ANY (%(ids)s::uuid[]))
"""

SERVICE_CONCERTS = """
SELECT concert_id, jsonb_build_object('version', version, 'title', title, 'venue', venue,
    'time_zone', time_zone, 'currency', currency, 'performances', (
        SELECT jsonb_object_agg(performance_id, jsonb_build_object('starts_at', starts_at,
            'sales_open_at', sales_open_at, 'sales_close_at', sales_close_at, 'status', status,
            'capacity', capacity))
        FROM performances WHERE performances.concert_id = concerts.concert_id))
FROM concerts
WHERE concert_id > %(after)s AND (%(until)s::bigint IS NULL OR concert_id <= %(until)s)
ORDER BY concert_id LIMIT %(limit)s
"""

# ---- the outbox

MAY_READ_OUTBOX = """
SELECT has_table_privilege('outbox', 'SELECT')
    AND has_table_privilege('outbox_relay_cursor', 'SELECT')
    AND has_table_privilege('outbox_relay_quarantine', 'SELECT')
"""

CURSOR = """
SELECT published_snapshot::text FROM outbox_relay_cursor
WHERE topic = %(topic)s ORDER BY updated_at DESC LIMIT 1
"""

# By the index on transaction_id: what the relay has before it may be little beside all.
PENDING = """
SELECT key, payload::text FROM outbox
WHERE topic = %(topic)s AND (
    transaction_id >= pg_snapshot_xmax(%(snapshot)s::pg_snapshot)
    OR transaction_id = ANY (ARRAY(SELECT pg_snapshot_xip(%(snapshot)s::pg_snapshot))))
"""

# So many rows, and about so many characters: one payload may be as large as a thousand others.
PUBLISHED = """
SELECT id, key, payload FROM (
    SELECT id, key, payload::text, sum(length(payload::text)) OVER (
        ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) - length(payload::text)
        AS characters_before
    FROM outbox
    WHERE id > %(after)s AND id <= %(until)s AND topic = %(topic)s
        AND pg_visible_in_snapshot(transaction_id, %(snapshot)s::pg_snapshot)
    ORDER BY id LIMIT %(limit)s
) AS page
WHERE characters_before < %(characters)s
"""

LAST_OUTBOX_ID = "SELECT coalesce(max(id), 0) FROM outbox"

QUARANTINED = """
SELECT id, key, error FROM outbox_relay_quarantine WHERE topic = %(topic)s ORDER BY id LIMIT 1000
"""

# ---- the analysts' tables

TABLES_RANGE = """
SELECT
    (SELECT count(*) FROM analytics.fct_reservations
        WHERE reservation_id > %(after)s AND reservation_id <= %(until)s),
    (SELECT coalesce(sum(hashtextextended(concat_ws('|', reservation_id, version, status,
            customer_id, performance_id, amount, currency, created_at, updated_at, expires_at),
            0)), 0)
        FROM analytics.fct_reservations
        WHERE reservation_id > %(after)s AND reservation_id <= %(until)s),
    (SELECT coalesce(sum(hashtextextended(reservation_id || ':' || version, 0)), 0)
        FROM analytics.fct_reservation_events
        WHERE reservation_id > %(after)s AND reservation_id <= %(until)s),
    (SELECT coalesce(sum(hashtextextended(concat_ws('|', reservation_id, seat_id, section, "row",
            number, price), 0)), 0)
        FROM analytics.fct_reservation_seats
        WHERE reservation_id > %(after)s AND reservation_id <= %(until)s)
"""

# Every id that any of the three tables knows.
TABLES_ROWS = """
WITH ids AS (
    SELECT reservation_id FROM analytics.fct_reservations
    WHERE reservation_id > %(after)s AND reservation_id <= %(until)s
        AND (%(ids)s::text[] IS NULL OR reservation_id = ANY (%(ids)s::text[]))
    UNION SELECT reservation_id FROM analytics.fct_reservation_events
    WHERE reservation_id > %(after)s AND reservation_id <= %(until)s
        AND (%(ids)s::text[] IS NULL OR reservation_id = ANY (%(ids)s::text[]))
    UNION SELECT reservation_id FROM analytics.fct_reservation_seats
    WHERE reservation_id > %(after)s AND reservation_id <= %(until)s
        AND (%(ids)s::text[] IS NULL OR reservation_id = ANY (%(ids)s::text[]))
    ORDER BY reservation_id
    LIMIT %(limit)s
)
SELECT ids.reservation_id, jsonb_build_object('version', version, 'status', status,
    'customer_id', customer_id, 'performance_id', performance_id, 'amount', amount,
    'currency', currency, 'created_at', created_at, 'updated_at', updated_at,
    'expires_at', expires_at, 'seats', (
        SELECT jsonb_agg(jsonb_build_array(seat_id, section, "row", number, price)
            ORDER BY seat_id)
        FROM analytics.fct_reservation_seats AS seat
        WHERE seat.reservation_id = ids.reservation_id)),
    ARRAY(SELECT event.version FROM analytics.fct_reservation_events AS event
        WHERE event.reservation_id = ids.reservation_id ORDER BY event.version)
FROM ids LEFT JOIN analytics.fct_reservations AS state USING (reservation_id)
"""

TABLES_CONCERTS = """
SELECT concert_id, jsonb_build_object('version', version, 'title', title, 'venue', venue,
    'time_zone', time_zone, 'currency', currency, 'performances', (
        SELECT jsonb_object_agg(performance_id, jsonb_build_object('starts_at', starts_at,
            'sales_open_at', sales_open_at, 'sales_close_at', sales_close_at, 'status', status,
            'capacity', capacity))
        FROM analytics.dim_performances AS performance
        WHERE performance.concert_id = concert.concert_id))
FROM analytics.dim_concerts AS concert WHERE concert_id > %(after)s AND concert_id <= %(until)s
"""

# The current state is the newest fact; in one statement, so in one snapshot.
STATES_AND_FACTS = """
SELECT reservation_id, to_jsonb(told), to_jsonb(stored) FROM (
    SELECT fact.reservation_id, fact.version, fact.status, fact.customer_id, fact.concert_id,
        fact.performance_id, fact.seat_count, fact.amount, fact.currency, fact.created_at,
        fact.occurred_at AS updated_at, fact.expires_at
    FROM analytics.fct_reservation_events AS fact
    LEFT JOIN analytics.fct_reservations AS state USING (reservation_id)
    WHERE state.version IS NULL OR fact.version >= state.version
) AS told
FULL JOIN (
    SELECT reservation_id, version, status, customer_id, concert_id, performance_id, seat_count,
        amount, currency, created_at, updated_at, expires_at
    FROM analytics.fct_reservations
) AS stored USING (reservation_id)
WHERE (told.version, told.status, told.customer_id, told.concert_id, told.performance_id,
        told.seat_count, told.amount, told.currency, told.created_at, told.updated_at,
        told.expires_at)
    IS DISTINCT FROM (stored.version, stored.status, stored.customer_id, stored.concert_id,
        stored.performance_id, stored.seat_count, stored.amount, stored.currency,
        stored.created_at, stored.updated_at, stored.expires_at)
LIMIT %(limit)s
"""

CREATE_TOLD = """
CREATE TEMPORARY TABLE told_events (LIKE analytics.fct_reservation_events INCLUDING DEFAULTS)
ON COMMIT DELETE ROWS
"""

# A batch is not worth a scan of all facts, whatever is guessed of a table without statistics.
PLAN_FOR_BATCH = """
SELECT
    set_config('enable_hashjoin', 'off', true),
    set_config('enable_mergejoin', 'off', true),
    set_config('enable_seqscan', 'off', true)
"""

# Where a fact isn't, or isn't as its record tells. (A zone that this server doesn't know may have
# given occurred_on another day: it is not compared.)
TOLD_AND_STORED = """
SELECT told.reservation_id || ':' || told.version, told.kafka_partition, told.kafka_offset,
    to_jsonb(told), to_jsonb(stored)
FROM pg_temp.told_events AS told
LEFT JOIN analytics.fct_reservation_events AS stored
    ON stored.reservation_id = told.reservation_id AND stored.version = told.version
WHERE (told.status, told.customer_id, told.concert_id, told.performance_id, told.seat_count,
        told.amount, told.currency, told.created_at, told.occurred_at, told.expires_at,
        told.event_type)
    IS DISTINCT FROM (stored.status, stored.customer_id, stored.concert_id, stored.performance_id,
        stored.seat_count, stored.amount, stored.currency, stored.created_at, stored.occurred_at,
        stored.expires_at, stored.event_type)
"""

# How many facts name a record of these as the one that brought them.
ORIGINS = """
SELECT told.kafka_partition, told.kafka_offset / %(width)s, count(*)
FROM pg_temp.told_events AS told
JOIN analytics.fct_reservation_events AS stored
    ON stored.reservation_id = told.reservation_id AND stored.version = told.version
    AND stored.kafka_partition = told.kafka_partition AND stored.kafka_offset = told.kafka_offset
GROUP BY 1, 2
"""

FACTS_BY_PLACE = """
SELECT kafka_partition, kafka_offset / %(width)s, count(*)
FROM analytics.fct_reservation_events
JOIN unnest(%(partitions)s::integer[], %(firsts)s::bigint[], %(ends)s::bigint[])
    AS read (number, first_offset, end_offset)
    ON number = kafka_partition AND kafka_offset >= first_offset AND kafka_offset < end_offset
GROUP BY 1, 2
"""

# Facts from where nothing has been loaded; in one snapshot with the offsets.
STRAY_FACTS = """
SELECT reservation_id || ':' || version, kafka_partition, kafka_offset
FROM analytics.fct_reservation_events
LEFT JOIN analytics.load_offsets AS place USING (kafka_partition)
WHERE coalesce(topic, %(topic)s) = %(topic)s
    AND (next_offset IS NULL OR kafka_offset >= next_offset OR kafka_offset < 0)
LIMIT 1000
"""

FACTS_OF_PLACES = """
SELECT reservation_id || ':' || version, kafka_partition, kafka_offset
FROM analytics.fct_reservation_events
WHERE (kafka_partition, kafka_offset / %(width)s) IN (
    SELECT * FROM unnest(%(partitions)s::integer[], %(buckets)s::bigint[])
)
"""

LETTERS_AT = """
SELECT kafka_offset FROM analytics.dead_letters
WHERE topic = %(topic)s AND kafka_partition = %(partition)s AND kafka_offset = ANY (%(offsets)s)
"""

LETTERS_LIKE = """
SELECT digest FROM (
    SELECT sha256(raw_key || '\\x00'::bytea || raw_value) AS digest FROM analytics.dead_letters
    WHERE topic = %(topic)s
) AS letters
WHERE digest = ANY (%(digests)s)
"""
