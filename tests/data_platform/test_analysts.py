"""The ten questions of docs/analysts.md have the answers that one can count by hand."""

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from benchmarks.analysts import Question, questions
from tests.data_platform.season import put_season
from tests.databases import AnalyticsDatabase


def march(day: int) -> date:
    return date(2026, 3, day)


ANSWERS: dict[int, list[tuple[Any, ...]]] = {
    1: [
        (march(2), "EUR", 1, 2, 10_000),
        (march(3), "EUR", 2, 2, 14_000),
        (march(3), "USD", 1, 2, 20_000),
        (march(4), "EUR", 1, 3, 18_000),
        (march(5), "USD", 1, 1, 12_500),
    ],
    2: [
        (
            datetime(2026, 5, 1, 18, tzinfo=UTC),
            *("Nacht der Streicher", 10, 3, 2, Decimal("0.3000")),
        ),
        (
            datetime(2026, 5, 2, 18, tzinfo=UTC),
            *("Nacht der Streicher", 10, 3, 0, Decimal("0.3000")),
        ),
    ],
    3: [("EUR", 1, "Nacht der Streicher", 33_000, 6), ("USD", 1, "Harbour Lights", 32_500, 3)],
    # In Berlin 00:30, 09:00, 10:10 and 11:01; in New York 10:04 and 22:00.
    4: [(0, 1), (9, 1), (10, 2), (11, 1), (22, 1)],
    5: [
        (march(2), 1, 1, 0, Decimal("1.000")),
        (march(3), 3, 3, 0, Decimal("1.000")),
        (march(4), 2, 1, 1, Decimal("0.500")),
    ],
    6: [(5, 240.0, 480.0)],  # 60, 120, 240, 300, 600 s
    7: [(1, 2), (3, 1)],
    8: [("Parkett", "USD", 2, 20_000), ("Balcony", "USD", 1, 12_500)],
    9: [(march(5), march(3), "EUR", 1, 9_000)],
    10: [(datetime(2026, 4, 1, 12, tzinfo=UTC), True, 0)],
}


def test_there_are_ten_questions() -> None:
    assert [question.number for question in questions()] == list(ANSWERS)


@pytest.mark.parametrize("question", questions(), ids=lambda question: str(question.number))
def test_a_question_is_answered_right(
    analytics_database: AnalyticsDatabase, question: Question
) -> None:
    put_season(analytics_database.owner_url)
    with psycopg.connect(analytics_database.analyst_url) as connection:
        connection.execute("SET timezone = 'UTC'")
        found = connection.execute(question.statement.encode()).fetchall()
    assert found == ANSWERS[question.number]


def test_nothing_is_complete_where_nobody_has_looked(analytics_database: AnalyticsDatabase) -> None:
    (last,) = (question for question in questions() if question.number == 10)
    with psycopg.connect(analytics_database.analyst_url) as connection:
        assert connection.execute(last.statement.encode()).fetchall() == [(None, False, None)]
