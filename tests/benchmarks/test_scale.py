"""Distances are compared with the nearest, and what was wrong in any run is told."""

from typing import Any

import pytest

from benchmarks import charts, report
from benchmarks.results import wrong
from benchmarks.scale import DELAYS_MS, WORKER, compared, goals, traffic
from benchmarks.split import ONE, TWO
from devstack.proxy import Proxy, Traffic


def drained(events_per_s: int, **more: Any) -> dict[str, Any]:
    return {"events_per_s": events_per_s, "lost": 0, "doubled": 0, "reordered": 0} | more


def test_the_better_of_two_runs_is_compared_with_the_better_one_at_no_distance() -> None:
    runs = {
        10: [drained(40_000), drained(60_000)],
        0: [drained(100_000), drained(80_000)],
        1: [drained(95_000), drained(90_000)],
    }
    found = list(compared(runs))
    assert [figure["delay_ms"] for figure in found] == [0, 1, 10]
    assert [figure["ratio"] for figure in found] == [1.0, 0.95, 0.6]


def test_what_was_wrong_in_the_slower_run_is_told() -> None:
    runs = {0: [drained(100_000), drained(80_000, lost=2)], 1: [drained(1, lost=-3), drained(2)]}
    assert [wrong(figure) for figure in compared(runs)] == ["2 lost", "3 lost"]


def test_a_distance_at_which_all_failed_has_no_figure_and_no_ratio_to_it() -> None:
    runs: dict[int, list[dict[str, Any]]] = {0: [], 1: [drained(50_000)]}
    (found,) = compared(runs)
    assert found["delay_ms"] == 1
    assert found["ratio"] is None


def test_traffic_is_what_came_since_then_by_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Proxy, "traffic", Traffic(1_500, 700, 30))
    with Proxy(lambda: 0) as proxy:
        found = traffic({"kafka": proxy}, {"kafka": Traffic(500, 200, 10)}, 100)
    assert found == {"kafka_sent_bytes": 10, "kafka_got_bytes": 5, "kafka_round_trips": 200}


FIGURES = [
    {"section": "scale", "rows": 10, "contender": name, "delay_ms": delay_ms} | drained(9, ratio=r)
    for name in ("at_least_once", "exactly_once", WORKER)
    for delay_ms, r in zip(DELAYS_MS, (1.0, 0.95, 0.5), strict=True)
] + [
    {"section": "scale", "rows": 10, "contender": ONE} | drained(9, ratio=1.0),
    {"section": "scale", "rows": 10, "contender": TWO}
    | drained(9, ratio=1.1, promised=("lost", "tables_wrong"), tables_wrong=1),
    {"section": "scale", "rows": 10, "contender": "sizes", "log_bytes": 1.0},
]


def test_distances_and_the_split_are_shown_each_in_a_table_of_its_own() -> None:
    assert len(report.distances(FIGURES).rows) == 9
    one, two = report.divided(FIGURES).rows
    assert (one[-1], two[-1]) == ("-", "1 tables_wrong")


def test_a_goal_that_is_missed_is_told() -> None:
    reached = {goal.what: goal.reached for goal in goals(FIGURES)}
    assert reached["worker, round trip 1 ms against 0"] is True
    assert reached["worker, round trip 10 ms against 0"] is False
    assert {goal.reached for goal in goals([])} == {None}


def test_the_chart_has_a_bar_for_each_part_at_each_distance() -> None:
    chart = charts._distance(FIGURES)
    assert chart is not None
    assert [len(values) for values, _ in chart.raw_series] == [3, 3, 3]
