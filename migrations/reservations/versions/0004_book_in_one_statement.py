"""A booking as one statement: `book_seats`, which the service calls by itself."""

from alembic import op

revision = "reservations_0004"
down_revision = "reservations_0003"

# Runs with the rights of who calls it, in a transaction of its own: one round trip, and no lock is
# held while anybody waits for the network or for a thread's turn (docs/decisions/0011). Locks are
# taken in the order that reservation_service/sql.py tells. Each statement in here has a snapshot of
# its own, younger than the locks that were waited for before it.
#
# Members are columns: row_to_json names them and writes them compactly. What the event and the
# answer look like is reservation_service/events.py's and booking.py's to say; a test compares.
BOOK_SEATS = """
CREATE FUNCTION book_seats(
    new_id uuid, for_customer text, in_performance bigint, wanted_seats bigint[],
    confirmed boolean, hold interval, most_seats_of_customer integer,
    key_operation text, key_text text, key_fingerprint bytea,
    event_topic text, event_envelope text, event_headers jsonb,
    OUT outcome text, OUT location text, OUT answer text, OUT detail bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    utc CONSTANT text := 'YYYY-MM-DD"T"HH24\\:MI\\:SS.US"Z"';
    sale record;
    made record;
    happened_at timestamptz;
    held_until timestamptz;
    already integer := 0;
BEGIN
    IF key_text IS NOT NULL THEN
        -- Waits for another transaction that is inserting the same key. A row that stays as it was
        -- is locked all the same, so nobody deletes it before it is read.
        INSERT INTO idempotency_keys AS k (caller, operation, key, fingerprint, created_at)
        VALUES (for_customer, key_operation, key_text, key_fingerprint, clock_timestamp())
        ON CONFLICT (caller, operation, key) DO UPDATE
        SET fingerprint = excluded.fingerprint, location = NULL, body = NULL,
            created_at = excluded.created_at
        WHERE k.created_at <= excluded.created_at - interval '24 hours';
        IF NOT FOUND THEN
            SELECT CASE k.fingerprint WHEN key_fingerprint THEN 'replayed' ELSE 'key-reused' END,
                k.location, k.body
            INTO outcome, location, answer FROM idempotency_keys AS k
            WHERE k.caller = for_customer AND k.operation = key_operation AND k.key = key_text;
            RETURN;
        END IF;
    END IF;

    IF most_seats_of_customer > 0 THEN
        -- Counted under a lock, else two bookings at once would both find room for themselves.
        PERFORM pg_advisory_xact_lock(
            hashtextextended('customer ' || for_customer || ' ' || in_performance, 0));
        SELECT count(*) INTO already
        FROM reservations AS r JOIN reservation_seats USING (reservation_id)
        WHERE r.customer_id = for_customer AND r.performance_id = in_performance
            AND (r.status = 'confirmed' OR r.status = 'held' AND r.expires_at > clock_timestamp());
    END IF;

    PERFORM FROM seats AS s
    WHERE s.seat_id = ANY (wanted_seats) AND s.performance_id = in_performance
    ORDER BY s.seat_id FOR UPDATE;

    SELECT c.concert_id, c.title, c.venue, c.time_zone, c.currency, p.starts_at, p.status,
        p.sales_open_at, p.sales_close_at
    INTO sale FROM performances AS p JOIN concerts AS c USING (concert_id)
    WHERE p.performance_id = in_performance;
    happened_at := clock_timestamp();
    SELECT array_agg(wanted ORDER BY wanted) INTO detail FROM unnest(wanted_seats) AS wanted
    WHERE NOT EXISTS (
        SELECT FROM seats AS s WHERE s.seat_id = wanted AND s.performance_id = in_performance
            AND NOT s.blocked AND (s.claimed_until IS NULL OR s.claimed_until <= happened_at));

    outcome := CASE
        WHEN sale IS NULL THEN 'no-performance'
        WHEN already + cardinality(wanted_seats) > nullif(most_seats_of_customer, 0)
            THEN 'customer-limit'
        WHEN sale.status <> 'scheduled' THEN 'cancelled'
        WHEN sale.starts_at <= happened_at THEN 'past'
        WHEN happened_at < sale.sales_open_at OR sale.sales_close_at <= happened_at THEN 'closed'
        WHEN detail IS NOT NULL THEN 'unavailable'
        ELSE 'booked' END;
    IF outcome <> 'booked' THEN
        IF outcome = 'customer-limit' THEN
            detail := ARRAY[already];
        END IF;
        DELETE FROM idempotency_keys
        WHERE caller = for_customer AND operation = key_operation AND key = key_text;
        -- Nothing is left of it, so it need not wait for the disk, nor may others wait for it.
        SET LOCAL synchronous_commit = off;
        RETURN;
    END IF;

    IF NOT confirmed THEN
        -- No hold outlives the sale: what could be held can be confirmed as long as it is held.
        held_until := least(happened_at + hold, sale.sales_close_at, sale.starts_at);
    END IF;
    WITH claimed AS (
        UPDATE seats AS s
        SET reservation_id = new_id, claimed_until = coalesce(held_until, 'infinity')
        WHERE s.seat_id = ANY (wanted_seats)
        RETURNING s.seat_id, s.section, s."row", s.number, s.price
    ), reserved AS (
        INSERT INTO reservations (reservation_id, customer_id, performance_id, status, version,
            amount, currency, created_at, updated_at, expires_at)
        SELECT new_id, for_customer, in_performance,
            CASE WHEN confirmed THEN 'confirmed' ELSE 'held' END, 1,
            sum(price), sale.currency, happened_at, happened_at, held_until
        FROM claimed
        RETURNING reservation_id, version, status, customer_id, amount, currency
    ), listed AS (
        INSERT INTO reservation_seats (reservation_id, seat_id, section, "row", number, price)
        SELECT new_id, c.seat_id, c.section, c."row", c.number, c.price FROM claimed AS c
    )
    SELECT reserved.*, to_char(happened_at AT TIME ZONE 'UTC', utc) AS created_at,
        to_char(held_until AT TIME ZONE 'UTC', utc) AS expires_at,
        (SELECT array_to_json(array_agg(claimed ORDER BY claimed.seat_id)) FROM claimed) AS seats
    INTO made FROM reserved;

    -- The new row is locked by us, as every key's has to be when its event is inserted.
    INSERT INTO outbox (topic, key, payload, headers)
    SELECT event_topic, made.reservation_id,
        (left(event_envelope, -1) || ',"time":"' || made.created_at
            || '","data":' || row_to_json(state) || '}')::json,
        event_headers
    FROM (
        SELECT made.reservation_id, made.version, made.status, made.customer_id, made.created_at,
            made.expires_at, made.amount, made.currency,
            (SELECT row_to_json(concert) FROM (SELECT sale.concert_id, sale.title, sale.venue,
                sale.time_zone) AS concert) AS concert,
            (SELECT row_to_json(performance) FROM (SELECT in_performance AS performance_id,
                to_char(sale.starts_at AT TIME ZONE 'UTC', utc) AS starts_at) AS performance
            ) AS performance,
            made.seats
    ) AS state;

    SELECT row_to_json(told) INTO answer FROM (
        SELECT made.reservation_id, made.status, made.version, in_performance AS performance_id,
            made.customer_id, made.seats, made.amount, made.currency, made.expires_at
    ) AS told;
    location := '/api/reservations/' || made.reservation_id;
    IF key_text IS NOT NULL THEN
        UPDATE idempotency_keys AS k SET location = book_seats.location, body = answer
        WHERE caller = for_customer AND operation = key_operation AND key = key_text;
    END IF;
END
$$;
COMMENT ON FUNCTION book_seats IS
    'Books seats, with the reservation, its event and its Idempotency-Key, in one statement.';
REVOKE ALL ON FUNCTION book_seats FROM PUBLIC;
GRANT EXECUTE ON FUNCTION book_seats TO reservation_service;
"""


def upgrade() -> None:
    op.execute(BOOK_SEATS)


def downgrade() -> None:
    op.execute("DROP FUNCTION book_seats")
