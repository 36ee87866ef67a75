"""The question for news stays cheap, and hears of every topic."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from outbox_relay import leadership, sql
from outbox_relay.news import News
from outbox_relay.reader import unseen_by
from tests.databases import ReservationDatabase
from tests.outbox_relay.test_reader import literal

BUSY, QUIET = "concert-reservation", "concert-catalogue"
ROWS = 5_000
FILL = """
INSERT INTO outbox (topic, key, payload) SELECT %s, 'k', '1' FROM generate_series(1, %s)
"""


@pytest.fixture
def writer(reservation_database: ReservationDatabase) -> Iterator[psycopg.Connection]:
    with psycopg.connect(reservation_database.owner_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def connection(reservation_database: ReservationDatabase) -> Iterator[psycopg.Connection]:
    with leadership.connect(reservation_database.relay_url) as connection:
        yield connection


def pages(connection: psycopg.Connection, news: News, topics: list[str]) -> int:
    """How many pages the next question will touch."""
    assert news._seen is not None
    bounds: dict[str, Any] = unseen_by(news._seen)
    literals = (bounds["xmax"], *map(literal, (bounds["in_progress"], topics)))
    with psycopg.ClientCursor(connection) as cursor:
        found = cursor.execute(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE outbox_relay_news(%s, %s, %s)",
            literals,
        ).fetchone()
    assert found is not None
    text = found[0] if isinstance(found[0], str | bytes) else json.dumps(found[0])
    plan = json.loads(text)[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def test_a_busy_topic_does_not_make_the_question_for_a_quiet_one_dearer(
    connection: psycopg.Connection, writer: psycopg.Connection
) -> None:
    news = News(connection)
    assert news.of([QUIET]) == {QUIET}, "it shall look for itself first"
    costs = []
    for _ in range(4):
        writer.execute(FILL, (BUSY, ROWS))
        assert news.of([QUIET]) == set()
        costs.append(pages(connection, news, [QUIET]))
    # A plan is made for each of the first questions, which reads the catalogue.
    assert max(costs) <= min(costs) + 20, costs
    writer.execute(FILL, (QUIET, 1))
    assert news.of([QUIET]) == {QUIET}
    assert news.of([QUIET]) == set()


def test_a_burst_of_one_topic_does_not_cut_another_one_s_news_off(
    connection: psycopg.Connection, writer: psycopg.Connection
) -> None:
    news = News(connection)
    news.of([BUSY, QUIET])
    assert news.of([BUSY, QUIET]) == set()
    with writer.transaction():
        writer.execute(FILL, (BUSY, 2 * sql.NEWS_MAX_ROWS))
        writer.execute(FILL, (QUIET, 1))
        writer.execute(FILL, (BUSY, 2 * sql.NEWS_MAX_ROWS))
    assert news.of([BUSY, QUIET]) == {BUSY, QUIET}
    assert news.of([BUSY, QUIET]) == set()


def test_who_falls_asleep_is_told_to_look_once_more(
    connection: psycopg.Connection, writer: psycopg.Connection
) -> None:
    news = News(connection)
    news.of([QUIET])
    writer.execute(FILL, (BUSY, 1))
    assert news.of([QUIET]) == set()
    assert news.of([BUSY, QUIET]) == {BUSY}
