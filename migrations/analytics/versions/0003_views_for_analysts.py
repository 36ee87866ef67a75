"""Views for analysts, calendar days beside the times, and the indexes that questions need.

Nobody is locked out of a large table: the new columns are nullable and have no default, and the
indexes are built CONCURRENTLY. So parts of this revision are committed one by one; each may be
done again after a failure.

Rows that a worker of the kind before loads have no day (null): the views then work it out, which
is right and slower. `data-platform rebuild` gives every row its day.
"""

from alembic import op

revision = "analytics_0003"
down_revision = "analytics_0002"

COLUMNS = """
ALTER TABLE analytics.fct_reservation_events ADD COLUMN IF NOT EXISTS occurred_on date;
ALTER TABLE analytics.fct_reservations ADD COLUMN IF NOT EXISTS created_on date;
ALTER TABLE analytics.load_offsets ADD COLUMN IF NOT EXISTS complete_up_to timestamptz;
COMMENT ON COLUMN analytics.fct_reservation_events.occurred_on IS
    'Day of occurred_at in the time zone that the event tells; UTC where that is unknown here. '
    'Null in rows of a worker before this column.';
COMMENT ON COLUMN analytics.fct_reservations.created_on IS
    'Day of created_at in the time zone that the event tells; UTC where that is unknown here. '
    'Null in rows of a worker before this column.';
COMMENT ON COLUMN analytics.load_offsets.complete_up_to IS
    'Every record that Kafka had committed before this moment has been read: loaded or put into '
    'dead_letters.';
"""

# An index over a column that an update changes would end HOT updates of fct_reservations: no
# index but on what stays the same for a reservation. The days are sorted with their nulls, so
# rows without a day are found by the same index. BRIN: facts come nearly in the order of time, and
# such an index costs the loader next to nothing.
INDEXES = {
    "fct_reservation_events_completed": """
        CREATE INDEX CONCURRENTLY fct_reservation_events_completed
        ON analytics.fct_reservation_events (occurred_on)
        INCLUDE (concert_id, performance_id, currency, seat_count, amount)
        WHERE event_type = 'reservation.completed'
    """,
    "fct_reservation_events_by_time": """
        CREATE INDEX CONCURRENTLY fct_reservation_events_by_time
        ON analytics.fct_reservation_events
        USING brin (occurred_at) WITH (pages_per_range = 32, autosummarize = on)
    """,
    "fct_reservations_of_a_performance": """
        CREATE INDEX CONCURRENTLY fct_reservations_of_a_performance
        ON analytics.fct_reservations (performance_id)
    """,
    "fct_reservations_by_day": """
        CREATE INDEX CONCURRENTLY fct_reservations_by_day
        ON analytics.fct_reservations (created_on)
    """,
}
# CONCURRENTLY waits for every older transaction, and nobody waits for it meanwhile.
WAIT_FOR_OLDER_TRANSACTIONS = "SET lock_timeout = '10min'"
AS_BEFORE = "SET lock_timeout = '5s'"

# The events may name a zone that this server's tables lack. It must not fail everybody's query.
KNOWN_TIME_ZONE = """
CREATE OR REPLACE FUNCTION analytics.known_time_zone(name text) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM timezone(name, now());
    RETURN name;
EXCEPTION WHEN invalid_parameter_value THEN
    RETURN 'UTC';
END
$$;
COMMENT ON FUNCTION analytics.known_time_zone(text) IS
    'The time zone of this name, UTC when the server knows none.';
"""

# WHERE on the day goes into both branches; the second one is empty where every row has its day.
DAILY_BOOKINGS = """
CREATE VIEW analytics.daily_bookings AS
WITH zones AS MATERIALIZED (
    SELECT performance_id, analytics.known_time_zone(time_zone) AS time_zone
    FROM analytics.dim_performances
),
completed AS (
    SELECT occurred_on AS day, concert_id, performance_id, currency, seat_count, amount
    FROM analytics.fct_reservation_events
    WHERE event_type = 'reservation.completed' AND occurred_on IS NOT NULL
    UNION ALL
    SELECT
        (event.occurred_at AT TIME ZONE coalesce(zones.time_zone, 'UTC'))::date, event.concert_id,
        event.performance_id, event.currency, event.seat_count, event.amount
    FROM analytics.fct_reservation_events AS event
    LEFT JOIN zones USING (performance_id)
    WHERE event.event_type = 'reservation.completed' AND event.occurred_on IS NULL
)
SELECT
    day, concert_id, performance_id, currency,
    count(*) AS bookings, sum(seat_count)::bigint AS seats, sum(amount)::bigint AS revenue
FROM completed
GROUP BY day, concert_id, performance_id, currency;

COMMENT ON VIEW analytics.daily_bookings IS
    'What was sold: one row per day, performance and currency with at least one completed '
    'booking. A booking counts on the day of its completion and stays counted when it is '
    'cancelled later.';
COMMENT ON COLUMN analytics.daily_bookings.day IS
    'Day of the completion, in the performance''s time zone.';
COMMENT ON COLUMN analytics.daily_bookings.concert_id IS 'The concert.';
COMMENT ON COLUMN analytics.daily_bookings.performance_id IS 'The performance.';
COMMENT ON COLUMN analytics.daily_bookings.currency IS
    'ISO 4217 code. Never add revenue of different currencies.';
COMMENT ON COLUMN analytics.daily_bookings.bookings IS 'Reservations completed.';
COMMENT ON COLUMN analytics.daily_bookings.seats IS 'Seats in them.';
COMMENT ON COLUMN analytics.daily_bookings.revenue IS
    'Sum of their amounts in minor units of currency.';
"""

# Grouped by the performance's key after the join: a WHERE on its columns then reaches the
# performances first, and few of them are looked up by the index. An inner join, because Postgres
# doesn't share out an outer one among processes; the performances without a booking come after.
PERFORMANCE_OCCUPANCY = """
CREATE VIEW analytics.performance_occupancy AS
SELECT
    performance.performance_id, performance.concert_id, concert.title, concert.venue,
    performance.starts_at, performance.time_zone, performance.status, performance.capacity,
    performance.bookings, performance.booked_seats, performance.held_seats,
    round(performance.booked_seats::numeric / performance.capacity, 4) AS occupancy,
    CASE
        WHEN performance.bookings = 0 THEN 0
        WHEN performance.least_currency = performance.greatest_currency THEN performance.amount
    END AS revenue,
    CASE
        WHEN performance.bookings = 0 THEN concert.currency
        WHEN performance.least_currency = performance.greatest_currency
        THEN performance.least_currency
    END AS currency
FROM (
    SELECT
        performance.performance_id, performance.concert_id, performance.starts_at,
        performance.time_zone, performance.status, performance.capacity,
        count(*) FILTER (WHERE reservation.status = 'confirmed') AS bookings,
        coalesce(sum(reservation.seat_count) FILTER (WHERE reservation.status = 'confirmed'), 0)
            AS booked_seats,
        coalesce(sum(reservation.seat_count) FILTER (WHERE reservation.status = 'held'), 0)
            AS held_seats,
        (sum(reservation.amount) FILTER (WHERE reservation.status = 'confirmed'))::bigint
            AS amount,
        min(reservation.currency) FILTER (WHERE reservation.status = 'confirmed')
            AS least_currency,
        max(reservation.currency) FILTER (WHERE reservation.status = 'confirmed')
            AS greatest_currency
    FROM analytics.dim_performances AS performance
    JOIN analytics.fct_reservations AS reservation
        ON reservation.performance_id = performance.performance_id
        AND (
            reservation.status = 'confirmed'
            OR (reservation.status = 'held' AND (reservation.expires_at <= now()) IS NOT TRUE)
        )
    GROUP BY performance.performance_id
    UNION ALL
    SELECT
        performance.performance_id, performance.concert_id, performance.starts_at,
        performance.time_zone, performance.status, performance.capacity, 0, 0, 0, NULL, NULL, NULL
    FROM analytics.dim_performances AS performance
    WHERE NOT EXISTS (
        SELECT FROM analytics.fct_reservations AS reservation
        WHERE reservation.performance_id = performance.performance_id
            AND (
                reservation.status = 'confirmed'
                OR (reservation.status = 'held' AND (reservation.expires_at <= now()) IS NOT TRUE)
            )
    )
) AS performance
LEFT JOIN analytics.dim_concerts AS concert USING (concert_id);

COMMENT ON VIEW analytics.performance_occupancy IS
    'How full each performance is now: one row per known performance, also one nobody has '
    'booked. Bookings that were cancelled do not count, holds only until they run out.';
COMMENT ON COLUMN analytics.performance_occupancy.performance_id IS 'The performance.';
COMMENT ON COLUMN analytics.performance_occupancy.concert_id IS 'Its concert.';
COMMENT ON COLUMN analytics.performance_occupancy.title IS 'The concert''s title.';
COMMENT ON COLUMN analytics.performance_occupancy.venue IS 'The concert''s venue.';
COMMENT ON COLUMN analytics.performance_occupancy.starts_at IS 'When it begins.';
COMMENT ON COLUMN analytics.performance_occupancy.time_zone IS 'IANA time zone of the venue.';
COMMENT ON COLUMN analytics.performance_occupancy.status IS
    'scheduled or cancelled; null until the catalogue has told of it.';
COMMENT ON COLUMN analytics.performance_occupancy.capacity IS
    'Number of seats, blocked ones too; null until the catalogue has told of it.';
COMMENT ON COLUMN analytics.performance_occupancy.bookings IS
    'Completed reservations that stand.';
COMMENT ON COLUMN analytics.performance_occupancy.booked_seats IS 'Seats in them.';
COMMENT ON COLUMN analytics.performance_occupancy.held_seats IS
    'Seats in holds that have not run out.';
COMMENT ON COLUMN analytics.performance_occupancy.occupancy IS
    'booked_seats / capacity, 0 to 1 with four decimals; null without a capacity.';
COMMENT ON COLUMN analytics.performance_occupancy.revenue IS
    'Sum of the amounts of bookings that stand, in minor units of currency; null when they are '
    'in different currencies (daily_bookings has each).';
COMMENT ON COLUMN analytics.performance_occupancy.currency IS
    'ISO 4217 code of revenue; the concert''s where nobody has booked.';
"""

# A confirmed reservation's last change is its completion. Only of a cancelled one the events must
# be asked whether, and when, it was completed before: by status, which the completion alone has,
# so that no plan walks the index of completions where the primary key gives a row or two.
BOOKING_FUNNEL = """
CREATE VIEW analytics.booking_funnel AS
WITH zones AS MATERIALIZED (
    SELECT performance_id, analytics.known_time_zone(time_zone) AS time_zone
    FROM analytics.dim_performances
),
started AS (
    SELECT
        created_on AS day, concert_id, performance_id, reservation_id, status, created_at,
        updated_at, expires_at
    FROM analytics.fct_reservations
    WHERE created_on IS NOT NULL
    UNION ALL
    SELECT
        (reservation.created_at AT TIME ZONE coalesce(zones.time_zone, 'UTC'))::date,
        reservation.concert_id, reservation.performance_id, reservation.reservation_id,
        reservation.status, reservation.created_at, reservation.updated_at, reservation.expires_at
    FROM analytics.fct_reservations AS reservation
    LEFT JOIN zones USING (performance_id)
    WHERE reservation.created_on IS NULL
)
SELECT
    started.day, started.concert_id, started.performance_id,
    count(*) AS started,
    count(*) FILTER (
        WHERE started.status = 'held' AND (started.expires_at <= now()) IS NOT TRUE
    ) AS open,
    count(completion.completed_at) AS completed,
    count(*) FILTER (WHERE started.status = 'cancelled' AND completion.completed_at IS NULL)
        AS cancelled_before_completion,
    count(*) FILTER (WHERE started.status = 'cancelled' AND completion.completed_at IS NOT NULL)
        AS cancelled_after_completion,
    count(*) FILTER (
        WHERE started.status = 'expired'
            OR (started.status = 'held' AND started.expires_at <= now())
    ) AS expired,
    extract(epoch FROM avg(completion.completed_at - started.created_at))::double precision
        AS mean_seconds_to_complete
FROM started
CROSS JOIN LATERAL (
    SELECT CASE started.status
        WHEN 'confirmed' THEN started.updated_at
        WHEN 'cancelled' THEN (
            SELECT min(event.occurred_at)
            FROM analytics.fct_reservation_events AS event
            WHERE event.reservation_id = started.reservation_id
                AND event.status = 'confirmed'
        )
    END AS completed_at
    OFFSET 0 -- else it would be looked up again for each of the columns above
) AS completion
GROUP BY started.day, started.concert_id, started.performance_id;

COMMENT ON VIEW analytics.booking_funnel IS
    'What became of the reservations begun on a day: one row per day and performance. started = '
    'open + completed + cancelled_before_completion + expired.';
COMMENT ON COLUMN analytics.booking_funnel.day IS
    'Day on which they were begun, in the performance''s time zone.';
COMMENT ON COLUMN analytics.booking_funnel.concert_id IS 'The concert.';
COMMENT ON COLUMN analytics.booking_funnel.performance_id IS 'The performance.';
COMMENT ON COLUMN analytics.booking_funnel.started IS
    'Reservations begun: held, or completed in one step.';
COMMENT ON COLUMN analytics.booking_funnel.open IS 'Held, and not run out.';
COMMENT ON COLUMN analytics.booking_funnel.completed IS
    'Completed, also those that were cancelled afterwards.';
COMMENT ON COLUMN analytics.booking_funnel.cancelled_before_completion IS 'Cancelled holds.';
COMMENT ON COLUMN analytics.booking_funnel.cancelled_after_completion IS
    'Cancelled bookings; they are in completed, too.';
COMMENT ON COLUMN analytics.booking_funnel.expired IS
    'Holds that ran out, whether or not their event has come.';
COMMENT ON COLUMN analytics.booking_funnel.mean_seconds_to_complete IS
    'Mean time from begin to completion of the completed ones; null without any.';
"""

# With the rights of its owner: analysts may see neither table behind it.
FRESHNESS = """
CREATE VIEW analytics.freshness AS
SELECT
    place.topic, place.kafka_partition, place.last_event_at,
    CASE WHEN place.next_offset > 0 THEN place.updated_at END AS last_load_at,
    CASE
        WHEN place.complete_up_to IS NOT NULL -- of NULL and 0 the greatest is 0
        THEN greatest(extract(epoch FROM now() - place.complete_up_to), 0)::double precision
    END AS lag_seconds,
    place.complete_up_to,
    (
        SELECT count(*) FROM analytics.dead_letters AS letter
        WHERE letter.topic = place.topic AND letter.kafka_partition = place.kafka_partition
    ) AS dead_letters
FROM analytics.load_offsets AS place;

COMMENT ON VIEW analytics.freshness IS
    'How fresh the tables are: one row per Kafka partition that a worker has ever had. The '
    'least complete_up_to of a topic holds for the topic.';
COMMENT ON COLUMN analytics.freshness.topic IS
    'concert-reservation fills the facts, concert-catalogue the dimensions.';
COMMENT ON COLUMN analytics.freshness.kafka_partition IS 'Kafka partition.';
COMMENT ON COLUMN analytics.freshness.last_event_at IS
    'When the newest loaded event happened; old where nothing happens. Null before the first.';
COMMENT ON COLUMN analytics.freshness.last_load_at IS
    'When something was loaded last; null before the first time.';
COMMENT ON COLUMN analytics.freshness.lag_seconds IS
    'How long ago complete_up_to was: a few seconds while workers run and keep up, also where '
    'nothing happens. Null while complete_up_to is.';
COMMENT ON COLUMN analytics.freshness.complete_up_to IS
    'Every event that was in Kafka before this moment is in the tables, apart from '
    'dead_letters. An event comes into Kafka some milliseconds after it happened, later when '
    'the relay was away. Null until a worker has looked.';
COMMENT ON COLUMN analytics.freshness.dead_letters IS
    'Records of the partition that could not be loaded because of what they contain.';
"""

VIEWS = ("daily_bookings", "performance_occupancy", "booking_funnel", "freshness")

GRANTS = """
REVOKE ALL ON FUNCTION analytics.known_time_zone(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION analytics.known_time_zone(text) TO data_platform, analyst;
GRANT SELECT ON analytics.daily_bookings, analytics.performance_occupancy,
    analytics.booking_funnel, analytics.freshness TO data_platform, analyst;
"""


def upgrade() -> None:
    op.execute(COLUMNS)
    with op.get_context().autocommit_block():
        op.execute(WAIT_FOR_OLDER_TRANSACTIONS)
        for name, create in INDEXES.items():
            # What an interrupted build leaves behind is invalid, and IF NOT EXISTS would keep it.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS analytics.{name}")
            op.execute(create)
        op.execute(AS_BEFORE)
    for statements in (
        KNOWN_TIME_ZONE,
        DAILY_BOOKINGS,
        PERFORMANCE_OCCUPANCY,
        BOOKING_FUNNEL,
        FRESHNESS,
        GRANTS,
    ):
        op.execute(statements)


def downgrade() -> None:
    op.execute(f"DROP VIEW analytics.{', analytics.'.join(VIEWS)}")
    op.execute("DROP FUNCTION analytics.known_time_zone(text)")
    op.execute(f"DROP INDEX analytics.{', analytics.'.join(INDEXES)}")
    op.execute(
        """
        ALTER TABLE analytics.load_offsets DROP COLUMN complete_up_to;
        ALTER TABLE analytics.fct_reservations DROP COLUMN created_on;
        ALTER TABLE analytics.fct_reservation_events DROP COLUMN occurred_on;
        """
    )
