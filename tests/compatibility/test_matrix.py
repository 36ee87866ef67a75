"""What the matrix promises without running it: `make compatibility` does that."""

import itertools
import json
from dataclasses import asdict
from typing import Any

import pytest

from tests.compatibility import pages, upgrade
from tests.compatibility.__main__ import RESULTS, table
from tests.compatibility.matrix import CELLS, problems

GOOD: dict[str, Any] = {
    "differences": [],
    "lost": 0,
    "doubled_in_tables": 0,
    "doubled_in_topic": 0,
    "reordered": 0,
    "events": 9,
    "protocol": "consumer",
}


def test_every_two_values_of_different_columns_stand_together_in_some_cell() -> None:
    rows = [asdict(cell) for cell in CELLS]
    for one, other in itertools.combinations(rows[0], 2):
        wanted = set(itertools.product({row[one] for row in rows}, {row[other] for row in rows}))
        assert {(row[one], row[other]) for row in rows} == wanted, (one, other)


@pytest.mark.parametrize(
    "bad",
    [
        {"lost": 1},
        {"doubled_in_tables": 1},
        {"doubled_in_topic": 1},
        {"reordered": 1},
        {"events": 0},
        {"protocol": "classic"},
        {"differences": ["a seat is sold twice"]},
    ],
    ids=str,
)
def test_a_result_that_is_not_as_it_must_be_is_a_problem(bad: dict[str, Any]) -> None:
    assert problems(CELLS[0], GOOD) == []
    assert len(problems(CELLS[0], GOOD | bad)) == 1


def test_the_page_shows_the_results_as_they_were_written() -> None:
    assert pages.written("matrix") == table(json.loads(RESULTS.read_text("utf-8")))
    upgrades = json.loads(upgrade.RESULTS.read_text("utf-8"))
    assert pages.written("upgrades") == upgrade.table(upgrades)
