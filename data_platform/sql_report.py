"""What `report` asks, as an analyst. Times end at the newest event, not now: a quiet week shows."""

# Sums over everything are the slowest; they take seconds on tens of millions of events.
SESSION = (
    "SELECT set_config('statement_timeout', '60s', false), set_config('timezone', 'UTC', false)"
)

TOTALS = """
SELECT
    (SELECT count(*) FROM analytics.fct_reservations) AS reservations,
    (SELECT count(*) FROM analytics.dim_performances) AS performances,
    (SELECT max(last_event_at) FROM analytics.freshness WHERE topic = %(topic)s) AS last_event_at,
    (SELECT min(complete_up_to) FROM analytics.freshness WHERE topic = %(topic)s)
        AS complete_up_to,
    now() AS made_at
"""

# From the bookings themselves: performance_occupancy has no revenue where currencies are mixed.
SOLD = """
SELECT currency, count(*) AS bookings, sum(seat_count)::bigint AS seats,
    sum(amount)::bigint AS revenue
FROM analytics.fct_reservations
WHERE status = 'confirmed'
GROUP BY currency
ORDER BY currency
"""

BOOKINGS_BY_HOUR = """
SELECT hour, count(event.reservation_id) AS bookings
FROM generate_series(
    date_trunc('hour', %(until)s::timestamptz) - interval '47 hours',
    date_trunc('hour', %(until)s::timestamptz),
    interval '1 hour'
) AS hour
LEFT JOIN analytics.fct_reservation_events AS event
    ON event.event_type = 'reservation.completed'
    AND event.occurred_at >= date_trunc('hour', %(until)s::timestamptz) - interval '47 hours'
    AND date_trunc('hour', event.occurred_at) = hour
GROUP BY hour
ORDER BY hour
"""

# One pass over all performances for both: the fullest by name, all of them by tenths.
OCCUPANCY = """
WITH every AS MATERIALIZED (
    SELECT performance_id, title, starts_at, capacity, booked_seats, held_seats, occupancy
    FROM analytics.performance_occupancy
    WHERE status IS DISTINCT FROM 'cancelled'
),
tenths AS (
    SELECT tenth, count(performance_id) AS performances
    FROM generate_series(0, 9) AS tenth
    LEFT JOIN every ON least(floor(occupancy * 10), 9) = tenth
    GROUP BY tenth
)
SELECT performance_id, title, starts_at, capacity, booked_seats, held_seats, occupancy,
    (SELECT array_agg(performances ORDER BY tenth) FROM tenths) AS by_tenth
FROM every
ORDER BY occupancy DESC NULLS LAST, starts_at, performance_id
LIMIT %(limit)s
"""

FUNNEL = """
SELECT
    coalesce(sum(started), 0)::bigint AS started,
    coalesce(sum(completed), 0)::bigint AS completed,
    coalesce(sum(cancelled_before_completion), 0)::bigint AS cancelled_before_completion,
    coalesce(sum(expired), 0)::bigint AS expired,
    coalesce(sum(open), 0)::bigint AS open,
    coalesce(sum(cancelled_after_completion), 0)::bigint AS cancelled_after_completion,
    sum(mean_seconds_to_complete * completed) / nullif(sum(completed), 0)
        AS mean_seconds_to_complete
FROM analytics.booking_funnel
WHERE day > (%(until)s::timestamptz AT TIME ZONE 'UTC')::date - 30
    AND day <= (%(until)s::timestamptz AT TIME ZONE 'UTC')::date + 1 -- east of UTC
"""

FRESHNESS = """
SELECT topic, kafka_partition, last_event_at, last_load_at, lag_seconds, complete_up_to,
    dead_letters
FROM analytics.freshness
ORDER BY topic, kafka_partition
LIMIT %(limit)s
"""
