"""The page is whole by itself, right, and sane whatever the tables hold."""

import re
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from subprocess import CompletedProcess, run

import psycopg
import pytest

from data_platform import report
from tests.data_platform.season import put_season
from tests.databases import AnalyticsDatabase

VOID = {"meta", "link", "br", "img"}
LOADING = {"src", "href", "xlink:href", "action", "data", "poster", "srcset"}
MANY = """
INSERT INTO analytics.dim_concerts (concert_id, version, title, venue, time_zone, currency)
SELECT n, 1, 'Concert ' || n, 'Hall', 'Europe/Berlin', 'EUR' FROM generate_series(1, 500) AS n;
INSERT INTO analytics.dim_performances (
    performance_id, concert_id, version, starts_at, capacity, time_zone
)
SELECT n, 1 + n % 500, 1, timestamptz '2026-05-01' + n * interval '1 hour', 100, 'Europe/Berlin'
FROM generate_series(1, 5000) AS n
"""


class Page(HTMLParser):
    """What a browser makes of the page: its text, its tags, what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [f"{name}={value}" for name, value in attrs if name in LOADING]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["title"]):
            self.text += f"{data} "


def written(database: AnalyticsDatabase) -> str:
    return report.page(report.read(database.analyst_url))


def command(database: AnalyticsDatabase, *arguments: str) -> CompletedProcess[str]:
    return run(
        [sys.executable, "-m", "data_platform", "report", *arguments],
        env={"ANALYST_DATABASE_URL": database.analyst_url, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_page_shows_what_was_booked(analytics_database: AnalyticsDatabase) -> None:
    put_season(analytics_database.owner_url)
    page = Page(written(analytics_database))
    assert page.open == []
    assert page.tags.count("svg") == 4  # nothing was booked in the last two days
    words = " ".join(page.text.split())
    for part in (
        "10 reservations, 4 performances",
        "complete up to 2026-04-01 12:00:00 UTC",
        "EUR 3 6 330.00",
        "USD 2 3 325.00",
        "Nacht der Streicher 2026-05-01 18:00 10 3 2",
        "Nobody Comes 2026-06-01 18:00 50 0 0",
        "60.0% were completed, after 220 s on average",
        "concert-reservation 1 2026-03-31 00:00:00",
    ):
        assert part in words, part


def test_the_page_loads_nothing_and_runs_nothing(analytics_database: AnalyticsDatabase) -> None:
    put_season(analytics_database.owner_url)
    text = written(analytics_database)
    page = Page(text)
    assert page.loads == []
    assert not {"script", "link", "iframe", "img", "object", "image", "use"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text.replace("url(#", "")
    assert "default-src 'none'" in text
    assert "@media print" in text


def test_a_title_is_text_whatever_it_contains(analytics_database: AnalyticsDatabase) -> None:
    put_season(analytics_database.owner_url)
    title = "<script>alert(1)</script> & \"'{0} \x0b\u202e" + "ö" * 150
    with psycopg.connect(analytics_database.owner_url) as connection:
        connection.execute("UPDATE analytics.dim_concerts SET title = %s", [title])
    page = Page(written(analytics_database))
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & \"'{0}" in page.text
    assert "\x0b" not in page.text
    assert "\u202e" not in page.text


def test_an_empty_database_gives_a_page_that_says_so(
    analytics_database: AnalyticsDatabase,
) -> None:
    page = Page(written(analytics_database))
    for part in ("0 reservations", "not known how complete", "No performances yet", "No worker"):
        assert part in page.text
    assert page.tags.count("svg") == 0
    assert page.text.count("None.") == 3


def test_money_of_two_currencies_in_one_performance_is_told_in_each(
    analytics_database: AnalyticsDatabase,
) -> None:
    put_season(analytics_database.owner_url)
    with psycopg.connect(analytics_database.owner_url) as connection:
        connection.execute(
            "INSERT INTO analytics.fct_reservations (reservation_id, version, status, customer_id,"
            " concert_id, performance_id, seat_count, amount, currency, created_at, updated_at)"
            " SELECT 'other', 1, status, customer_id, concert_id, performance_id, 1, 700, 'CHF',"
            " created_at, updated_at FROM analytics.fct_reservations"
            " WHERE status = 'confirmed' AND currency = 'EUR' LIMIT 1"
        )
    words = " ".join(Page(written(analytics_database)).text.split())
    assert "CHF 1 1 7.00 EUR 3 6 330.00 USD 2 3 325.00" in words


def test_thousands_of_performances_make_no_larger_page(
    analytics_database: AnalyticsDatabase,
) -> None:
    with psycopg.connect(analytics_database.owner_url) as connection:
        connection.execute(MANY)
    text = written(analytics_database)
    assert len(text) < 200_000
    assert "The fullest 25 of 5,000" in text


def test_the_command_writes_a_file_whole_or_prints_the_page(
    analytics_database: AnalyticsDatabase, tmp_path: Path
) -> None:
    put_season(analytics_database.owner_url)
    file = tmp_path / "report.html"
    done = command(analytics_database, "--output", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert file.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [file]
    printed = command(analytics_database)
    assert printed.returncode == 0
    assert printed.stdout.startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("output", ["missing/folder/report.html", "."])
def test_a_file_that_cannot_be_written_is_told_in_one_line(
    analytics_database: AnalyticsDatabase, tmp_path: Path, output: str
) -> None:
    done = command(analytics_database, "--output", str(tmp_path / output))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--output" in done.stderr


@pytest.mark.parametrize(
    ("amount", "currency", "shown"),
    [
        (123_456, "EUR", "1,234.56"),
        (1_234, "JPY", "1,234"),
        (1_234, "KWD", "1.234"),
        (2**53 + 1, "USD", "90,071,992,547,409.93"),
        (5, None, "0.05"),
    ],
)
def test_money_has_the_digits_of_its_currency(
    amount: int, currency: str | None, shown: str
) -> None:
    assert report._money(amount, currency) == shown


def test_times_are_shown_in_utc() -> None:
    assert report._moment(datetime(2026, 1, 1, tzinfo=UTC)) == "2026-01-01 00:00:00 UTC"
    assert re.fullmatch(r"never", report._moment(None))
