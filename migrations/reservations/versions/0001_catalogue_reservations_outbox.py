"""Catalogue, seats, reservations, idempotency records, outbox and the relay's cursor."""

from alembic import op

from migrations.roles import missing_roles

revision = "reservations_0001"
down_revision = None

ROLES = missing_roles("reservation_service", "outbox_relay")

CATALOGUE = """
CREATE TABLE concerts (
    concert_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    title text NOT NULL CHECK (title <> ''),
    venue text NOT NULL CHECK (venue <> ''),
    time_zone text NOT NULL CHECK (time_zone <> ''),
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    version integer NOT NULL DEFAULT 1 CHECK (version >= 1),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE concerts IS 'A concert at a venue; version rises with every published change.';

CREATE TABLE performances (
    performance_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    concert_id bigint NOT NULL REFERENCES concerts,
    starts_at timestamptz NOT NULL,
    sales_open_at timestamptz NOT NULL,
    sales_close_at timestamptz NOT NULL CHECK (sales_close_at > sales_open_at),
    status text NOT NULL DEFAULT 'scheduled' CHECK (status IN ('scheduled', 'cancelled')),
    capacity integer NOT NULL CHECK (capacity > 0)
);
CREATE INDEX performances_of_a_concert ON performances (concert_id, starts_at);
COMMENT ON TABLE performances IS 'One evening of a concert, with its sales window.';

-- A seat is taken while claimed_until lies in the future: a hold that ran out frees its seats by
-- the clock alone. 'infinity' is a confirmed one. The fillfactor leaves room for HOT updates:
-- no index covers a column that a booking changes.
CREATE TABLE seats (
    seat_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    performance_id bigint NOT NULL REFERENCES performances,
    section text NOT NULL CHECK (section <> ''),
    "row" text NOT NULL CHECK ("row" <> ''),
    number integer NOT NULL CHECK (number > 0),
    price bigint NOT NULL CHECK (price >= 0),
    blocked boolean NOT NULL DEFAULT false,
    reservation_id uuid,
    claimed_until timestamptz,
    CHECK ((reservation_id IS NULL) = (claimed_until IS NULL)),
    UNIQUE (performance_id, section, "row", number)
) WITH (fillfactor = 80);
COMMENT ON TABLE seats IS 'A seat of one performance with its price in minor units and its claim.';
"""

# No foreign key from a reservation to its performance or seats: its check would lock the same
# performance row for every booking. Nobody has the right to delete a performance or a seat.
RESERVATIONS = """
CREATE TABLE reservations (
    reservation_id uuid PRIMARY KEY,
    customer_id text NOT NULL CHECK (customer_id ~ '^[A-Za-z0-9._-]{1,64}$'),
    performance_id bigint NOT NULL,
    status text NOT NULL CHECK (status IN ('held', 'confirmed', 'cancelled', 'expired')),
    version integer NOT NULL CHECK (version >= 1),
    amount bigint NOT NULL CHECK (amount >= 0),
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    expires_at timestamptz,
    CHECK ((status = 'held') = (expires_at IS NOT NULL))
) WITH (fillfactor = 80);
CREATE INDEX reservations_of_a_customer ON reservations (customer_id, reservation_id);
CREATE INDEX reservations_held ON reservations (expires_at) WHERE status = 'held';
COMMENT ON TABLE reservations IS 'Latest state of each reservation; version rises with each event.';

CREATE TABLE reservation_seats (
    reservation_id uuid NOT NULL REFERENCES reservations,
    seat_id bigint NOT NULL,
    section text NOT NULL,
    "row" text NOT NULL,
    number integer NOT NULL,
    price bigint NOT NULL,
    PRIMARY KEY (reservation_id, seat_id)
);
COMMENT ON TABLE reservation_seats IS
    'What was reserved, at the price of that moment; stays after cancellation and expiry.';

CREATE TABLE idempotency_keys (
    caller text NOT NULL,
    operation text NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    location text,
    body text,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (caller, operation, key)
);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
COMMENT ON TABLE idempotency_keys IS
    'Answer of each 201 by its Idempotency-Key, written in the booking''s transaction; kept 24 h.';
"""

# Unlogged: a count that a crash forgets is no loss, and costs no write-ahead log.
WRITE_COUNTS = """
CREATE UNLOGGED TABLE write_counts (
    customer_id text NOT NULL,
    minute timestamptz NOT NULL,
    writes integer NOT NULL CHECK (writes > 0),
    PRIMARY KEY (customer_id, minute)
);
COMMENT ON TABLE write_counts IS
    'Writes of each customer per minute, for RESERVATION_WRITES_PER_MINUTE; kept an hour.';
"""

OUTBOX_TOPICS = """
CREATE TABLE outbox_topics (
    topic text PRIMARY KEY CHECK (topic ~ '^[a-zA-Z0-9._-]{1,249}$'),
    max_bytes integer NOT NULL CHECK (max_bytes > 0)
);
COMMENT ON TABLE outbox_topics IS
    'Topics that may be published; max_bytes bounds key + payload + headers of one record.';
INSERT INTO outbox_topics (topic, max_bytes)
VALUES ('concert-reservation', 1000000), ('concert-catalogue', 1000000);
"""

# CACHE 1: with more, each session takes a block of ids ahead and version 2 gets a smaller id than
# version 1. EXTERNAL: pg_column_size() then tells the true size without reading the value, by which
# the relay bounds its batches in bytes.
OUTBOX = """
CREATE TABLE outbox (
    id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY,
    transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id(),
    topic text NOT NULL,
    key text NOT NULL CONSTRAINT outbox_key_is_given CHECK (key <> ''),
    payload json NOT NULL,
    headers jsonb NOT NULL DEFAULT '{}' CONSTRAINT outbox_headers_are_texts CHECK (
        jsonb_typeof(headers) = 'object'
        AND NOT jsonb_path_exists(headers, 'strict $.* ? (@.type() != "string")')
    ),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
ALTER TABLE outbox
    ALTER COLUMN payload SET STORAGE EXTERNAL,
    ALTER COLUMN headers SET STORAGE EXTERNAL,
    ALTER COLUMN key SET STORAGE EXTERNAL;
CREATE INDEX outbox_by_transaction ON outbox (transaction_id);
COMMENT ON TABLE outbox IS
    'Events in the transaction of the change they tell of. Append-only: never updated.';
COMMENT ON COLUMN outbox.transaction_id IS
    'The writing transaction, by which the relay tells committed from in-flight rows.';
COMMENT ON COLUMN outbox.payload IS 'The record''s value, published byte for byte.';
COMMENT ON COLUMN outbox.headers IS 'The record''s headers as {"name": "text"}.';

-- What could never be published fails here, in the writer's transaction, where somebody can still
-- do something about it; behind the commit it could only block its key.
CREATE FUNCTION outbox_refuse_unpublishable() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    allowed_bytes integer;
    wanted_bytes bigint;
BEGIN
    -- Whoever inserts: an xid of somebody's choice would hide the row from the relay.
    NEW.transaction_id := pg_current_xact_id();
    -- Drivers send NULL for "none".
    NEW.headers := coalesce(NEW.headers, '{}');
    SELECT max_bytes INTO allowed_bytes FROM public.outbox_topics WHERE topic = NEW.topic;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'outbox: topic "%" is not in outbox_topics', NEW.topic
            USING ERRCODE = 'check_violation', TABLE = 'outbox', CONSTRAINT = 'outbox_topic_known';
    END IF;
    wanted_bytes := octet_length(NEW.key) + octet_length(NEW.payload::text)
        + octet_length(NEW.headers::text);
    IF wanted_bytes > allowed_bytes THEN
        RAISE EXCEPTION 'outbox: record of % bytes, topic "%" takes %',
                wanted_bytes, NEW.topic, allowed_bytes
            USING ERRCODE = 'check_violation', TABLE = 'outbox', CONSTRAINT = 'outbox_record_fits';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER outbox_refuse_unpublishable BEFORE INSERT ON outbox
    FOR EACH ROW EXECUTE FUNCTION outbox_refuse_unpublishable();
"""

# One row a relay name. batch_* are set while a batch is being published, so that a restart in its
# middle reads exactly the same rows; the identity tells whether this is still the same history.
RELAY_CURSOR = """
CREATE TABLE outbox_relay_cursor (
    relay_name text PRIMARY KEY,
    delivery text NOT NULL CHECK (delivery IN ('at_least_once', 'exactly_once')),
    leader_epoch bigint NOT NULL CHECK (leader_epoch >= 1),
    leader text NOT NULL,
    published_snapshot pg_snapshot NOT NULL,
    batch_snapshot pg_snapshot,
    batch_last_id bigint,
    system_identifier bigint NOT NULL,
    database_oid oid NOT NULL,
    timeline text NOT NULL,
    wal_lsn pg_lsn NOT NULL,
    published_rows bigint NOT NULL DEFAULT 0,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((batch_snapshot IS NULL) = (batch_last_id IS NULL))
) WITH (fillfactor = 50);
COMMENT ON TABLE outbox_relay_cursor IS
    'How far each relay has published: all rows visible in published_snapshot, and of those '
    'visible in batch_snapshot the ones up to batch_last_id.';
"""

GRANTS = """
GRANT SELECT ON alembic_version TO reservation_service, outbox_relay;
GRANT SELECT, INSERT, UPDATE ON concerts, performances, seats TO reservation_service;
GRANT SELECT, INSERT, UPDATE ON reservations TO reservation_service;
GRANT SELECT, INSERT ON reservation_seats TO reservation_service;
GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_keys TO reservation_service;
GRANT SELECT, INSERT, UPDATE, DELETE ON write_counts TO reservation_service;
GRANT SELECT ON outbox_topics TO reservation_service, outbox_relay;
GRANT INSERT (topic, key, payload, headers) ON outbox TO reservation_service;
GRANT SELECT ON outbox TO outbox_relay;
GRANT SELECT, INSERT, UPDATE ON outbox_relay_cursor TO outbox_relay;
"""

STEPS = (ROLES, CATALOGUE, RESERVATIONS, WRITE_COUNTS, OUTBOX_TOPICS, OUTBOX, RELAY_CURSOR, GRANTS)


def upgrade() -> None:
    for statements in STEPS:
        op.execute(statements)


def downgrade() -> None:
    op.execute(
        """
        REVOKE ALL ON alembic_version FROM reservation_service, outbox_relay;
        DROP TABLE outbox_relay_cursor;
        DROP TABLE outbox;
        DROP FUNCTION outbox_refuse_unpublishable;
        DROP TABLE outbox_topics, write_counts, idempotency_keys, reservation_seats, reservations,
            seats, performances, concerts;
        """
    )
