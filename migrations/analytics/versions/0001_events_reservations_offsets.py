"""Reservation facts, current state, load offsets and dead letters in schema `analytics`."""

from alembic import op

from migrations.roles import missing_roles

revision = "analytics_0001"
down_revision = None

ROLES = missing_roles("data_platform", "analyst")

# Identifiers are compared byte for byte (COLLATE "C"): faster, and no locale can merge two keys.
FACTS = """
CREATE SCHEMA analytics;
COMMENT ON SCHEMA analytics IS 'Concert reservations for analysts, loaded from Kafka.';

CREATE TABLE analytics.fct_reservation_events (
    reservation_id text COLLATE "C" NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    event_type text COLLATE "C" NOT NULL,
    occurred_at timestamptz NOT NULL,
    status text COLLATE "C" NOT NULL
        CHECK (status IN ('held', 'confirmed', 'cancelled', 'expired')),
    customer_id text COLLATE "C" NOT NULL,
    concert_id bigint NOT NULL,
    performance_id bigint NOT NULL,
    seat_count integer NOT NULL CHECK (seat_count >= 1),
    amount bigint NOT NULL,
    currency text COLLATE "C" NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    kafka_partition integer NOT NULL,
    kafka_offset bigint NOT NULL,
    loaded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (reservation_id, version)
);

CREATE TABLE analytics.fct_reservations (
    reservation_id text COLLATE "C" PRIMARY KEY,
    version integer NOT NULL CHECK (version >= 1),
    status text COLLATE "C" NOT NULL
        CHECK (status IN ('held', 'confirmed', 'cancelled', 'expired')),
    customer_id text COLLATE "C" NOT NULL,
    concert_id bigint NOT NULL,
    performance_id bigint NOT NULL,
    seat_count integer NOT NULL CHECK (seat_count >= 1),
    amount bigint NOT NULL,
    currency text COLLATE "C" NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    expires_at timestamptz,
    loaded_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 80);
"""

LOADER_STATE = """
CREATE TABLE analytics.load_offsets (
    topic text COLLATE "C" NOT NULL,
    kafka_partition integer NOT NULL CHECK (kafka_partition >= 0),
    next_offset bigint NOT NULL CHECK (next_offset >= 0),
    topic_id text COLLATE "C" NOT NULL,
    last_event_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, kafka_partition)
) WITH (fillfactor = 50);

CREATE TABLE analytics.dead_letters (
    topic text COLLATE "C" NOT NULL,
    kafka_partition integer NOT NULL,
    kafka_offset bigint NOT NULL,
    raw_key bytea,
    raw_value bytea,
    raw_headers jsonb NOT NULL DEFAULT '[]',
    reason text NOT NULL,
    error text NOT NULL,
    first_seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, kafka_partition, kafka_offset)
);
"""

COMMENTS = """
COMMENT ON TABLE analytics.fct_reservation_events IS
    'One row per event: every change of every reservation, never updated.';
COMMENT ON COLUMN analytics.fct_reservation_events.reservation_id IS 'The reservation (UUIDv7).';
COMMENT ON COLUMN analytics.fct_reservation_events.version IS
    'Counts the reservation''s changes from 1, without a gap.';
COMMENT ON COLUMN analytics.fct_reservation_events.event_type IS
    'CloudEvents type: reservation.held, .extended, .completed, .cancelled or .expired.';
COMMENT ON COLUMN analytics.fct_reservation_events.occurred_at IS
    'When the change happened in the reservation service.';
COMMENT ON COLUMN analytics.fct_reservation_events.status IS 'Status after the change.';
COMMENT ON COLUMN analytics.fct_reservation_events.customer_id IS 'Who reserved.';
COMMENT ON COLUMN analytics.fct_reservation_events.concert_id IS 'The concert.';
COMMENT ON COLUMN analytics.fct_reservation_events.performance_id IS 'The performance.';
COMMENT ON COLUMN analytics.fct_reservation_events.seat_count IS 'Number of seats reserved.';
COMMENT ON COLUMN analytics.fct_reservation_events.amount IS
    'Sum of the seats'' prices in minor units of currency.';
COMMENT ON COLUMN analytics.fct_reservation_events.currency IS 'ISO 4217 code.';
COMMENT ON COLUMN analytics.fct_reservation_events.created_at IS
    'When the reservation was made (its version 1).';
COMMENT ON COLUMN analytics.fct_reservation_events.expires_at IS
    'When the hold runs out; null unless held.';
COMMENT ON COLUMN analytics.fct_reservation_events.kafka_partition IS
    'Partition of the record that brought the event first.';
COMMENT ON COLUMN analytics.fct_reservation_events.kafka_offset IS
    'Offset of the record that brought the event first.';
COMMENT ON COLUMN analytics.fct_reservation_events.loaded_at IS
    'Start of the transaction that loaded the event.';

COMMENT ON TABLE analytics.fct_reservations IS
    'One row per reservation: its latest known state.';
COMMENT ON COLUMN analytics.fct_reservations.reservation_id IS 'The reservation (UUIDv7).';
COMMENT ON COLUMN analytics.fct_reservations.version IS 'Version of the event it shows.';
COMMENT ON COLUMN analytics.fct_reservations.status IS 'held, confirmed, cancelled or expired.';
COMMENT ON COLUMN analytics.fct_reservations.customer_id IS 'Who reserved.';
COMMENT ON COLUMN analytics.fct_reservations.concert_id IS 'The concert.';
COMMENT ON COLUMN analytics.fct_reservations.performance_id IS 'The performance.';
COMMENT ON COLUMN analytics.fct_reservations.seat_count IS 'Number of seats reserved.';
COMMENT ON COLUMN analytics.fct_reservations.amount IS
    'Sum of the seats'' prices in minor units of currency.';
COMMENT ON COLUMN analytics.fct_reservations.currency IS 'ISO 4217 code.';
COMMENT ON COLUMN analytics.fct_reservations.created_at IS 'When the reservation was made.';
COMMENT ON COLUMN analytics.fct_reservations.updated_at IS 'When its latest change happened.';
COMMENT ON COLUMN analytics.fct_reservations.expires_at IS
    'When the hold runs out; null unless held.';
COMMENT ON COLUMN analytics.fct_reservations.loaded_at IS
    'Start of the transaction that loaded this state.';

COMMENT ON TABLE analytics.load_offsets IS
    'Next offset to load per partition, moved in the transaction that loads the rows.';
COMMENT ON COLUMN analytics.load_offsets.topic IS 'Kafka topic.';
COMMENT ON COLUMN analytics.load_offsets.kafka_partition IS 'Kafka partition.';
COMMENT ON COLUMN analytics.load_offsets.next_offset IS 'First offset not yet loaded.';
COMMENT ON COLUMN analytics.load_offsets.topic_id IS
    'Kafka''s id of the topic: another id means a topic made anew under the same name.';
COMMENT ON COLUMN analytics.load_offsets.last_event_at IS
    'When the newest loaded event of the partition happened.';
COMMENT ON COLUMN analytics.load_offsets.updated_at IS 'When the offset moved last.';

COMMENT ON TABLE analytics.dead_letters IS
    'Records that could not be loaded because of what they contain, kept byte for byte.';
COMMENT ON COLUMN analytics.dead_letters.topic IS 'Kafka topic.';
COMMENT ON COLUMN analytics.dead_letters.kafka_partition IS 'Kafka partition.';
COMMENT ON COLUMN analytics.dead_letters.kafka_offset IS 'Kafka offset.';
COMMENT ON COLUMN analytics.dead_letters.raw_key IS 'The record''s key; null stays null.';
COMMENT ON COLUMN analytics.dead_letters.raw_value IS 'The record''s value; null stays null.';
COMMENT ON COLUMN analytics.dead_letters.raw_headers IS
    'The record''s headers in order, as [[name, value in base64 or null], ...].';
COMMENT ON COLUMN analytics.dead_letters.reason IS 'Short name of what is wrong.';
COMMENT ON COLUMN analytics.dead_letters.error IS 'The exception''s text.';
COMMENT ON COLUMN analytics.dead_letters.first_seen_at IS 'When it was put here.';
"""

# The analyst gets each table by name: what is added later is not readable by accident.
GRANTS = """
GRANT SELECT ON alembic_version TO data_platform;
GRANT USAGE ON SCHEMA analytics TO data_platform, analyst;
GRANT SELECT, INSERT ON analytics.fct_reservation_events TO data_platform;
GRANT SELECT, INSERT, UPDATE ON analytics.fct_reservations, analytics.load_offsets
    TO data_platform;
GRANT SELECT, INSERT, UPDATE, DELETE ON analytics.dead_letters TO data_platform;
GRANT SELECT ON analytics.fct_reservation_events, analytics.fct_reservations TO analyst;
"""

STEPS = (ROLES, FACTS, LOADER_STATE, COMMENTS, GRANTS)


def upgrade() -> None:
    for statements in STEPS:
        op.execute(statements)


def downgrade() -> None:
    op.execute(
        """
        REVOKE ALL ON alembic_version FROM data_platform;
        DROP TABLE analytics.dead_letters, analytics.load_offsets, analytics.fct_reservations,
            analytics.fct_reservation_events;
        DROP SCHEMA analytics;
        """
    )
