"""Every statement of the reservation service. A test prepares each against the real schema.

Locks are always taken in this order, so no mix of calls can deadlock: idempotency key, advisory
lock of a customer, concert, reservation rows by ascending reservation_id, then seats by ascending
seat_id in one statement. A booking locks no concert, and no reservation but its own new one.

Time is Postgres' alone, and a decision reads it with clock_timestamp() in a statement after the
one that waited for the locks: now() is the transaction's start and may lie before that wait.
"""

SCHEMA_REVISION = "SELECT version_num FROM alembic_version"

# ---- catalogue

INSERT_CONCERT = """
INSERT INTO concerts (title, venue, time_zone, currency, fingerprint)
VALUES (%(title)s, %(venue)s, %(time_zone)s, %(currency)s, %(fingerprint)s)
RETURNING concert_id
"""

INSERT_PERFORMANCE = """
INSERT INTO performances (concert_id, starts_at, sales_open_at, sales_close_at, capacity)
VALUES (%(concert_id)s, %(starts_at)s, %(sales_open_at)s, %(sales_close_at)s, %(capacity)s)
RETURNING performance_id
"""

INSERT_SEATS = """
INSERT INTO seats (performance_id, section, "row", number, price)
SELECT %(performance_id)s, rows.section, rows."row", number, rows.price
FROM unnest(
    %(sections)s::text[], %(rows)s::text[], %(firsts)s::integer[], %(counts)s::integer[],
    %(prices)s::bigint[]
) WITH ORDINALITY AS rows (section, "row", first, count, price, position)
CROSS JOIN generate_series(rows.first, rows.first + rows.count - 1) AS number
ORDER BY rows.position, number
"""

SELECT_CONCERTS = """
SELECT c.concert_id, c.title, c.venue, c.time_zone, (
    SELECT json_agg(json_build_object(
        'performance_id', p.performance_id, 'starts_at', p.starts_at,
        'sales_open_at', p.sales_open_at, 'sales_close_at', p.sales_close_at,
        'capacity', p.capacity, 'status', p.status
    ) ORDER BY p.starts_at, p.performance_id)::text
    FROM performances AS p WHERE p.concert_id = c.concert_id
)
FROM concerts AS c
"""

READ_CONCERTS = (
    SELECT_CONCERTS
    + """
WHERE c.concert_id > %(after)s
ORDER BY c.concert_id
LIMIT %(limit)s
"""
)

# What is still to come, by its next begin. The page before ended with the concert `after`, which
# next begins at `begins_at`.
READ_CONCERTS_TO_COME = (
    SELECT_CONCERTS  # noqa: S608 - constants alone
    + """
JOIN (
    SELECT concert_id, min(starts_at) AS begins_at FROM performances
    WHERE starts_at > %(now)s GROUP BY concert_id
    HAVING (min(starts_at), concert_id) > (%(begins_at)s, %(after)s)
    ORDER BY begins_at, concert_id LIMIT %(limit)s
) AS next USING (concert_id)
ORDER BY next.begins_at, c.concert_id
"""
)

READ_CONCERT_STATE = """
SELECT c.concert_id, c.version, c.title, c.venue, c.time_zone, c.currency, clock_timestamp(), (
    SELECT json_agg(json_build_object(
        'performance_id', p.performance_id, 'starts_at', p.starts_at,
        'sales_open_at', p.sales_open_at, 'sales_close_at', p.sales_close_at,
        'status', p.status, 'capacity', p.capacity, 'sections', (
            SELECT json_agg(json_build_object(
                'section', s.section, 'capacity', s.capacity, 'blocked', s.blocked,
                'price_min', s.price_min, 'price_max', s.price_max
            ) ORDER BY s.first_seat_id)
            FROM (
                SELECT section, count(*) AS capacity, count(*) FILTER (WHERE blocked) AS blocked,
                    min(price) AS price_min, max(price) AS price_max,
                    min(seat_id) AS first_seat_id
                FROM seats WHERE performance_id = p.performance_id GROUP BY section
            ) AS s
        )
    ) ORDER BY p.starts_at, p.performance_id)::text
    FROM performances AS p WHERE p.concert_id = c.concert_id
)
FROM concerts AS c
WHERE c.concert_id = %(concert_id)s
"""

READ_PERFORMANCE = """
SELECT c.concert_id, c.title, c.venue, c.time_zone, c.currency, p.performance_id, p.starts_at,
    p.sales_open_at, p.sales_close_at, p.status, clock_timestamp() AS now
FROM performances AS p JOIN concerts AS c USING (concert_id)
WHERE p.performance_id = %(performance_id)s
"""

READ_SEATS = """
SELECT seat_id, section, "row", number, price,
    CASE WHEN blocked THEN 'blocked'
        WHEN claimed_until = 'infinity' THEN 'reserved'
        WHEN claimed_until > statement_timestamp() THEN 'held'
        ELSE 'available' END
FROM seats WHERE performance_id = %(performance_id)s
ORDER BY seat_id
"""

# A letter a seat: the first ones of READ_SEATS' words, in its order.
READ_SEAT_STATES = """
SELECT c.version, (
    SELECT string_agg(
        CASE WHEN blocked THEN 'b'
            WHEN claimed_until = 'infinity' THEN 'r'
            WHEN claimed_until > statement_timestamp() THEN 'h'
            ELSE 'a' END, '' ORDER BY seat_id)
    FROM seats WHERE performance_id = %(performance_id)s
)
FROM performances AS p JOIN concerts AS c USING (concert_id)
WHERE p.performance_id = %(performance_id)s
"""

READ_VERSION_OF_CONCERT = """
SELECT c.version FROM performances AS p JOIN concerts AS c USING (concert_id)
WHERE p.performance_id = %(performance_id)s
"""

COUNT_CONCERTS_TO_BOOK = """
SELECT count(*) FROM concerts AS c CROSS JOIN LATERAL (
    SELECT * FROM performances WHERE concert_id = c.concert_id
    ORDER BY starts_at, performance_id LIMIT 1
) AS p
WHERE p.status = 'scheduled' AND p.starts_at > now() + interval '1 day'
    AND p.sales_open_at <= now() AND p.sales_close_at > now() + interval '1 day'
    AND %(seats)s <= (
        SELECT count(*) FROM seats AS s WHERE s.performance_id = p.performance_id
            AND NOT s.blocked AND (s.claimed_until IS NULL OR s.claimed_until <= now())
    )
"""

LOCK_SEEDING = "SELECT pg_advisory_xact_lock(hashtextextended('reservation-service seed-demo', 0))"

# ---- changes of the catalogue

LOCK_CONCERT = "SELECT 1 FROM concerts WHERE concert_id = %(concert_id)s FOR NO KEY UPDATE"

# A performance never moves to another concert.
LOCK_CONCERT_OF_PERFORMANCE = """
SELECT c.concert_id FROM performances AS p JOIN concerts AS c USING (concert_id)
WHERE p.performance_id = %(performance_id)s
FOR NO KEY UPDATE OF c
"""

RAISE_CONCERT_VERSION = """
UPDATE concerts SET version = version + 1 WHERE concert_id = %(concert_id)s
"""

CHANGE_CONCERT = """
UPDATE concerts SET title = %(title)s, venue = %(venue)s
WHERE concert_id = %(concert_id)s AND (title, venue) <> (%(title)s, %(venue)s)
RETURNING 1
"""

CHANGE_PERFORMANCE = """
UPDATE performances SET starts_at = %(starts_at)s, sales_open_at = %(sales_open_at)s,
    sales_close_at = %(sales_close_at)s
WHERE performance_id = %(performance_id)s AND (starts_at, sales_open_at, sales_close_at)
    <> (%(starts_at)s, %(sales_open_at)s, %(sales_close_at)s)
RETURNING 1
"""

CANCEL_PERFORMANCE = """
UPDATE performances SET status = 'cancelled', cancelling = true
WHERE performance_id = %(performance_id)s AND status = 'scheduled'
RETURNING 1
"""

LOCK_SEATS_OF_PERFORMANCE = """
SELECT seat_id FROM seats
WHERE seat_id = ANY(%(seat_ids)s::bigint[]) AND performance_id = %(performance_id)s
ORDER BY seat_id
FOR UPDATE
"""

READ_TAKEN_SEATS = """
SELECT seat_id FROM seats
WHERE seat_id = ANY(%(seat_ids)s::bigint[]) AND claimed_until > clock_timestamp()
"""

# A hold that ran out loses its claim here, so that no clock that is set back makes it count again.
BLOCK_SEATS = """
UPDATE seats SET blocked = true, reservation_id = NULL, claimed_until = NULL
WHERE seat_id = ANY(%(seat_ids)s::bigint[]) AND NOT blocked
RETURNING seat_id
"""

RELEASE_SEATS = """
UPDATE seats SET blocked = false
WHERE seat_id = ANY(%(seat_ids)s::bigint[]) AND blocked
RETURNING seat_id
"""

# Two imports at once: the second one waits and finds the first one's concert.
LOCK_IMPORTS = (
    "SELECT pg_advisory_xact_lock(hashtextextended('reservation-service import-concert', 0))"
)

# What came out of the same file, or else what looks as if it had.
FIND_IMPORTED = """
SELECT concert_id, fingerprint IS NOT DISTINCT FROM %(fingerprint)s::bytea AS same
FROM concerts AS c
WHERE fingerprint = %(fingerprint)s OR (title = %(title)s AND venue = %(venue)s AND EXISTS (
    SELECT FROM performances AS p WHERE p.concert_id = c.concert_id AND p.status = 'scheduled'
        AND p.starts_at = ANY(%(starts_at)s::timestamptz[])
))
ORDER BY same DESC, concert_id
LIMIT 1
"""

# ---- cancellation of a performance

LIST_CANCELLING = "SELECT performance_id FROM performances WHERE cancelling ORDER BY performance_id"

LIST_SEATS = "SELECT seat_id FROM seats WHERE performance_id = %(performance_id)s ORDER BY seat_id"

# Waits for whoever has one of them; what is returned is what they left.
LOCK_CLAIMS = """
SELECT reservation_id FROM seats WHERE seat_id = ANY(%(seat_ids)s::bigint[])
ORDER BY seat_id
FOR UPDATE
"""

LOCK_RESERVATIONS = """
SELECT 1 FROM reservations WHERE reservation_id = ANY(%(reservation_ids)s::uuid[])
ORDER BY reservation_id
FOR UPDATE
"""

FINISH_CANCELLING = """
UPDATE performances SET cancelling = false WHERE performance_id = %(performance_id)s AND cancelling
"""

# ---- booking

# Waits for another transaction that is inserting the same key. A row that stays as it was is
# locked all the same, so nobody deletes it before READ_IDEMPOTENCY_KEY.
CLAIM_IDEMPOTENCY_KEY = """
INSERT INTO idempotency_keys (caller, operation, key, fingerprint, created_at)
VALUES (%(caller)s, %(operation)s, %(key)s, %(fingerprint)s, clock_timestamp())
ON CONFLICT (caller, operation, key) DO UPDATE
SET fingerprint = excluded.fingerprint, location = NULL, body = NULL,
    created_at = excluded.created_at
WHERE idempotency_keys.created_at <= excluded.created_at - interval '24 hours'
RETURNING 1
"""

READ_IDEMPOTENCY_KEY = """
SELECT fingerprint, location, body FROM idempotency_keys
WHERE caller = %(caller)s AND operation = %(operation)s AND key = %(key)s
"""

REMEMBER_ANSWER = """
UPDATE idempotency_keys SET location = %(location)s, body = %(body)s
WHERE caller = %(caller)s AND operation = %(operation)s AND key = %(key)s
"""

# As book_seats: a hold that is being confirmed counts when the next booking counts.
LOCK_CUSTOMER_OF_RESERVATION = """
SELECT pg_advisory_xact_lock(hashtextextended(
    'customer ' || customer_id || ' ' || performance_id::text, 0))
FROM reservations
WHERE reservation_id = %(reservation_id)s AND customer_id = %(customer_id)s
"""

# The function is in the migrations, and takes its locks in the order told above.
BOOK_SEATS = """
SELECT outcome, location, answer, detail FROM book_seats(
    %(reservation_id)s, %(customer_id)s, %(performance_id)s, %(seat_ids)s::bigint[], %(confirm)s,
    %(hold)s, %(max_seats_per_customer)s, %(operation)s, %(key)s, %(fingerprint)s,
    %(topic)s, %(envelope)s, %(headers)s
)
"""

# ---- best available

# A row of the plan each, in its order: (section, lowest and highest number, numbers and ids of the
# free seats, in no order).
READ_FREE_SEATS = """
SELECT section, min(number), max(number),
    array_agg(number) FILTER (WHERE free), array_agg(seat_id) FILTER (WHERE free)
FROM (
    SELECT seat_id, section, "row", number, NOT blocked
        AND (claimed_until IS NULL OR claimed_until <= statement_timestamp()) AS free
    FROM seats WHERE performance_id = %(performance_id)s
) AS seats
GROUP BY section, "row"
ORDER BY min(seat_id)
"""

# Locks of the session, tried and never waited for. Returns the seats that another session has.
ANNOUNCE_SEATS = """
SELECT seat_id FROM unnest(%(seat_ids)s::bigint[]) AS seat_id
WHERE NOT pg_try_advisory_lock(hashtextextended('best-available ' || seat_id::text, 0))
"""

UNANNOUNCE_SEATS = """
SELECT pg_advisory_unlock(hashtextextended('best-available ' || seat_id::text, 0))
FROM unnest(%(seat_ids)s::bigint[]) AS seat_id
"""

# ---- changes of a reservation

LOCK_RESERVATION = """
SELECT 1 FROM reservations
WHERE reservation_id = %(reservation_id)s AND customer_id = %(customer_id)s
FOR UPDATE
"""

LOCK_SEATS_OF_RESERVATION = """
SELECT 1 FROM reservations AS o
JOIN reservation_seats AS r USING (reservation_id) JOIN seats AS s USING (seat_id)
WHERE o.reservation_id = %(reservation_id)s AND o.customer_id = %(customer_id)s
ORDER BY s.seat_id
FOR UPDATE OF s
"""

LOCK_SEATS_OF_RESERVATIONS = """
SELECT 1 FROM reservation_seats AS r JOIN seats AS s USING (seat_id)
WHERE r.reservation_id = ANY(%(reservation_ids)s::uuid[])
ORDER BY s.seat_id
FOR UPDATE OF s
"""

READ_RESERVATIONS = """
SELECT r.reservation_id, r.customer_id, r.status, r.version, r.created_at, r.expires_at, r.amount,
    r.currency, json_build_object(
        'concert_id', c.concert_id, 'title', c.title, 'venue', c.venue, 'time_zone', c.time_zone
    )::text AS concert, json_build_object(
        'performance_id', p.performance_id, 'starts_at', p.starts_at
    )::text AS performance, (
        SELECT json_agg(json_build_object(
            'seat_id', s.seat_id, 'section', s.section, 'row', s."row", 'number', s.number,
            'price', s.price
        ) ORDER BY s.seat_id)::text
        FROM reservation_seats AS s WHERE s.reservation_id = r.reservation_id
    ) AS seats, NOT EXISTS (
        SELECT FROM reservation_seats AS s JOIN seats USING (seat_id)
        WHERE s.reservation_id = r.reservation_id
            AND seats.reservation_id IS DISTINCT FROM r.reservation_id
    ) AS owns_its_seats, p.status AS performance_status,
    least(p.sales_close_at, p.starts_at) AS sale_ends_at, clock_timestamp() AS now
FROM reservations AS r
JOIN performances AS p USING (performance_id)
JOIN concerts AS c USING (concert_id)
WHERE r.reservation_id = ANY(%(reservation_ids)s::uuid[])
ORDER BY r.reservation_id DESC
"""

LIST_RESERVATIONS = """
SELECT reservation_id FROM reservations
WHERE customer_id = %(customer_id)s AND reservation_id < %(before)s
ORDER BY reservation_id DESC
LIMIT %(limit)s
"""

CHANGE_RESERVATION = """
UPDATE reservations SET status = %(status)s, version = %(version)s, expires_at = NULL,
    updated_at = %(changed_at)s
WHERE reservation_id = %(reservation_id)s
"""

EXTEND_RESERVATION = """
UPDATE reservations SET version = %(version)s, expires_at = %(expires_at)s,
    updated_at = %(changed_at)s
WHERE reservation_id = %(reservation_id)s
"""

EXTEND_SEATS = """
UPDATE seats SET claimed_until = %(expires_at)s
WHERE seat_id = ANY(%(seat_ids)s::bigint[]) AND reservation_id = %(reservation_id)s
"""

# A seat that somebody else has taken since is not touched.
CONFIRM_SEATS = """
UPDATE seats SET claimed_until = 'infinity'
WHERE seat_id = ANY(%(seat_ids)s::bigint[]) AND reservation_id = %(reservation_id)s
"""

FREE_SEATS = """
UPDATE seats SET claimed_until = NULL, reservation_id = NULL
WHERE seat_id = ANY(%(seat_ids)s::bigint[]) AND reservation_id = %(reservation_id)s
"""

# ---- expiry

# now() is early enough to be right and, unlike clock_timestamp(), can use the index.
LOCK_LAPSED_HOLDS = """
SELECT reservation_id, expires_at FROM reservations
WHERE status = 'held' AND expires_at <= now()
ORDER BY expires_at
LIMIT %(limit)s
FOR UPDATE SKIP LOCKED
"""

DELETE_OLD_IDEMPOTENCY_KEYS = """
DELETE FROM idempotency_keys WHERE (caller, operation, key) IN (
    SELECT caller, operation, key FROM idempotency_keys
    WHERE created_at <= now() - interval '24 hours'
    ORDER BY created_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
"""

DELETE_OLD_WRITE_COUNTS = """
DELETE FROM write_counts WHERE (customer_id, minute) IN (
    SELECT customer_id, minute FROM write_counts WHERE minute < now() - interval '1 hour'
    LIMIT %(limit)s FOR UPDATE SKIP LOCKED
)
"""

# ---- limit of writes

COUNT_WRITE = """
INSERT INTO write_counts AS c (customer_id, minute, writes)
VALUES (%(customer_id)s, date_trunc('minute', clock_timestamp()), 1)
ON CONFLICT (customer_id, minute) DO UPDATE SET writes = c.writes + 1
RETURNING c.writes,
    ceil(extract(epoch FROM c.minute + interval '1 minute' - clock_timestamp()))::integer
"""

# ---- reservation codes

# Waits for whoever shows the same reservation for the first time; READ_CODE then finds that code.
KEEP_CODE = """
INSERT INTO reservation_codes (reservation_id, code) VALUES (%(reservation_id)s, %(code)s)
ON CONFLICT (reservation_id) DO NOTHING
"""

READ_CODE = "SELECT code FROM reservation_codes WHERE reservation_id = %(reservation_id)s"

FIND_CODE = "SELECT reservation_id FROM reservation_codes WHERE code = %(code)s"

# ---- page

# Whose claim shows as "yours" on the map; a hold that ran out is nobody's.
LIST_OWN_SEATS = """
SELECT seat_id FROM reservations AS r
JOIN reservation_seats USING (reservation_id)
WHERE r.customer_id = %(customer_id)s AND r.performance_id = %(performance_id)s
    AND (r.status = 'confirmed' OR (r.status = 'held' AND r.expires_at > clock_timestamp()))
ORDER BY seat_id
LIMIT 500
"""

READ_CLOCK = "SELECT clock_timestamp()"
