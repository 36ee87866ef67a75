"""Seats of each reservation, and the dimensions: concerts and performances."""

from alembic import op

revision = "analytics_0002"
down_revision = "analytics_0001"

SEATS = """
CREATE TABLE analytics.fct_reservation_seats (
    reservation_id text COLLATE "C" NOT NULL,
    seat_id bigint NOT NULL,
    performance_id bigint NOT NULL,
    section text NOT NULL,
    "row" text NOT NULL,
    number integer NOT NULL,
    price bigint NOT NULL,
    currency text COLLATE "C" NOT NULL,
    version integer NOT NULL CHECK (version >= 1),
    loaded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (reservation_id, seat_id)
);
"""

# Two columns that let the loader leave a reservation's seats alone as long as they are the same.
# Both without a default: no row of a large table is rewritten.
SEATS_OF_THE_STATE = """
ALTER TABLE analytics.fct_reservations
    ADD COLUMN seats_version integer,
    ADD COLUMN seats_digest bigint;
"""

DIMENSIONS = """
CREATE TABLE analytics.dim_concerts (
    concert_id bigint PRIMARY KEY,
    version integer NOT NULL CHECK (version >= 0),
    title text NOT NULL,
    venue text NOT NULL,
    time_zone text NOT NULL,
    currency text COLLATE "C",
    occurred_at timestamptz,
    loaded_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE analytics.dim_performances (
    performance_id bigint PRIMARY KEY,
    concert_id bigint NOT NULL,
    version integer NOT NULL CHECK (version >= 0),
    starts_at timestamptz NOT NULL,
    sales_open_at timestamptz,
    sales_close_at timestamptz,
    status text COLLATE "C" CHECK (status IN ('scheduled', 'cancelled')),
    capacity integer CHECK (capacity >= 1),
    time_zone text NOT NULL,
    occurred_at timestamptz,
    loaded_at timestamptz NOT NULL DEFAULT now()
);
"""

COMMENTS = """
COMMENT ON COLUMN analytics.fct_reservations.seats_version IS
    'Version that brought the seats as they are in fct_reservation_seats; null before they were.';
COMMENT ON COLUMN analytics.fct_reservations.seats_digest IS
    'For the loader: tells whether a later version has other seats. Nothing to count or join by.';

COMMENT ON TABLE analytics.fct_reservation_seats IS
    'One row per reservation and seat, of its latest known state; fct_reservations has the status.';
COMMENT ON COLUMN analytics.fct_reservation_seats.reservation_id IS 'The reservation (UUIDv7).';
COMMENT ON COLUMN analytics.fct_reservation_seats.seat_id IS 'The seat.';
COMMENT ON COLUMN analytics.fct_reservation_seats.performance_id IS 'The performance.';
COMMENT ON COLUMN analytics.fct_reservation_seats.section IS 'Section of the hall.';
COMMENT ON COLUMN analytics.fct_reservation_seats."row" IS 'Row in the section, as printed.';
COMMENT ON COLUMN analytics.fct_reservation_seats.number IS 'Number in the row.';
COMMENT ON COLUMN analytics.fct_reservation_seats.price IS
    'Price when it was reserved, in minor units of currency.';
COMMENT ON COLUMN analytics.fct_reservation_seats.currency IS 'ISO 4217 code.';
COMMENT ON COLUMN analytics.fct_reservation_seats.version IS
    'Version of the reservation that brought the seat; later ones may have left it as it was.';
COMMENT ON COLUMN analytics.fct_reservation_seats.loaded_at IS
    'Start of the transaction that loaded the seat.';

COMMENT ON TABLE analytics.dim_concerts IS
    'One row per concert: its latest known state.';
COMMENT ON COLUMN analytics.dim_concerts.concert_id IS 'The concert.';
COMMENT ON COLUMN analytics.dim_concerts.version IS
    'Version of the catalogue''s event it shows; 0 when only reservations have told of it yet.';
COMMENT ON COLUMN analytics.dim_concerts.title IS 'Title.';
COMMENT ON COLUMN analytics.dim_concerts.venue IS 'Venue.';
COMMENT ON COLUMN analytics.dim_concerts.time_zone IS 'IANA time zone of the venue.';
COMMENT ON COLUMN analytics.dim_concerts.currency IS
    'ISO 4217 code of its prices; null at version 0.';
COMMENT ON COLUMN analytics.dim_concerts.occurred_at IS
    'When its latest change happened; null at version 0.';
COMMENT ON COLUMN analytics.dim_concerts.loaded_at IS
    'Start of the transaction that loaded this state.';

COMMENT ON TABLE analytics.dim_performances IS
    'One row per performance of a concert: its latest known state.';
COMMENT ON COLUMN analytics.dim_performances.performance_id IS 'The performance.';
COMMENT ON COLUMN analytics.dim_performances.concert_id IS 'Its concert.';
COMMENT ON COLUMN analytics.dim_performances.version IS
    'Version of the concert''s event it shows; 0 when only reservations have told of it yet.';
COMMENT ON COLUMN analytics.dim_performances.starts_at IS 'When it begins.';
COMMENT ON COLUMN analytics.dim_performances.sales_open_at IS
    'When sales open; null at version 0.';
COMMENT ON COLUMN analytics.dim_performances.sales_close_at IS
    'When sales close; null at version 0.';
COMMENT ON COLUMN analytics.dim_performances.status IS
    'scheduled or cancelled; null at version 0.';
COMMENT ON COLUMN analytics.dim_performances.capacity IS 'Number of seats; null at version 0.';
COMMENT ON COLUMN analytics.dim_performances.time_zone IS
    'IANA time zone of the venue: days are counted in it.';
COMMENT ON COLUMN analytics.dim_performances.occurred_at IS
    'When the concert''s latest change happened; null at version 0.';
COMMENT ON COLUMN analytics.dim_performances.loaded_at IS
    'Start of the transaction that loaded this state.';
"""

GRANTS = """
GRANT SELECT, INSERT, DELETE ON analytics.fct_reservation_seats TO data_platform;
GRANT SELECT, INSERT, UPDATE ON analytics.dim_concerts, analytics.dim_performances
    TO data_platform;
GRANT SELECT ON analytics.fct_reservation_seats, analytics.dim_concerts,
    analytics.dim_performances TO analyst;
"""

STEPS = (SEATS, SEATS_OF_THE_STATE, DIMENSIONS, COMMENTS, GRANTS)


def upgrade() -> None:
    for statements in STEPS:
        op.execute(statements)


def downgrade() -> None:
    op.execute(
        """
        DROP TABLE analytics.dim_performances, analytics.dim_concerts,
            analytics.fct_reservation_seats;
        ALTER TABLE analytics.fct_reservations
            DROP COLUMN seats_digest, DROP COLUMN seats_version;
        """
    )
