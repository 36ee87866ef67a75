"""Each event and reservation gets its day where the performance is, as Postgres would count it."""

import psycopg
import pytest

from data_platform.events import decode_reservation_event
from tests.data_platform.histories import event
from tests.databases import AnalyticsDatabase

CONCERT = {"concert_id": 1, "title": "T", "venue": "V"}
MOMENTS = [
    "2027-03-27T22:59:59.999999Z",  # around the night in which Europe's clocks go forward
    "2027-03-27T23:00:00Z",
    "2027-03-28T21:59:59Z",
    "2027-03-28T22:00:00Z",
    "2027-06-30T18:14:59Z",
    "2027-06-30T18:15:00Z",  # midnight in Kathmandu
    "2027-12-31T10:00:00Z",
]
ZONES = ["Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Kiritimati", "UTC"]


def days(time: str, time_zone: str, created_at: str | None = None) -> tuple[str, str]:
    one = event("r", concert=CONCERT | {"time_zone": time_zone}, created_at=created_at or time)
    one = type(one)({**one.envelope, "time": time})
    found = decode_reservation_event(one.key, one.value)
    return found.occurred_on, found.created_on


@pytest.mark.parametrize("time_zone", ZONES)
def test_a_day_is_the_one_that_postgres_counts(
    analytics_database: AnalyticsDatabase, time_zone: str
) -> None:
    with psycopg.connect(analytics_database.analyst_url) as connection:
        for time in MOMENTS:
            (expected,) = connection.execute(
                "SELECT (%s::timestamptz AT TIME ZONE %s)::date::text", (time, time_zone)
            ).fetchone() or ("",)
            assert days(time, time_zone) == (expected, expected), time


def test_creation_and_change_have_days_of_their_own() -> None:
    assert days("2027-01-02T01:00:00Z", "America/New_York", "2026-12-31T05:00:00Z") == (
        "2027-01-01",
        "2026-12-31",
    )


@pytest.mark.parametrize(
    "time_zone",
    ["Mars/Olympus", "Europe", "../../etc/passwd", "/etc/passwd", "x" * 200, "a\tb", " ", "Zürich"],
)
def test_a_name_that_is_no_time_zone_means_utc_and_hurts_nobody(time_zone: str) -> None:
    assert days("2027-01-31T23:30:00Z", time_zone) == ("2027-01-31", "2027-01-31")


def test_the_ends_of_the_calendar_have_days() -> None:
    assert days("0001-01-01T00:00:00Z", "America/New_York")[0] == "0001-01-01"
    assert days("9999-12-31T23:59:59Z", "Asia/Tokyo")[0] == "9999-12-31"
