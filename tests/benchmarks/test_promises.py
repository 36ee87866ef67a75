"""The promises' figures are computed right: comparisons, gaps, ways, tables, charts."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import charts, publish, report
from benchmarks.promise_failover import longest_gap_s
from benchmarks.promise_group import longest_s
from benchmarks.promise_pace import per_second
from benchmarks.promise_parts import compare
from benchmarks.promises import PROMISED
from benchmarks.results import Results, wrong

TOLD = {("a", 1), ("a", 2), ("b", 1)}
STATES = {"a": 2, "b": 1}
FACTS = dict.fromkeys(TOLD, 1)
RIGHT = {"events": 3, "lost": 0, "stale": 0, "doubled": 0, "invented": 0}


@pytest.mark.parametrize(
    ("states", "facts", "found"),
    [
        (STATES, FACTS, {}),
        (STATES, {("a", 1): 1, ("b", 1): 1}, {"lost": 1}),
        (STATES, FACTS | {("b", 1): 2}, {"doubled": 1}),
        (STATES | {"a": 1}, FACTS, {"stale": 1}),
        (STATES, FACTS | {("c", 1): 1}, {"invented": 1}),
        # As many as there have to be, and yet one is lost.
        (STATES, {("a", 1): 2, ("b", 1): 1}, {"lost": 1, "doubled": 1}),
    ],
)
def test_tables_are_compared_event_by_event(
    states: dict[str, int], facts: dict[tuple[str, int], int], found: dict[str, int]
) -> None:
    compared = compare(TOLD, states, facts)
    assert compared == RIGHT | found
    assert bool(wrong(compared | {"promised": PROMISED})) == bool(found)


def test_the_longest_gap_is_within_a_partition() -> None:
    # All of them together have no gap longer than 1.
    stamps = {0: [1.0, 1.1, 4.1], 1: [2.0, 3.0, 5.0], 2: [3.5]}
    assert longest_gap_s(stamps) == pytest.approx(3.0)
    assert longest_gap_s({0: [4.0, 1.0, 2.0]}) == 2.0  # another leader's clock
    assert longest_gap_s({0: [4.0]}) == 0.0


def test_an_events_way_counts_for_the_worker_that_had_its_partition() -> None:
    committed = {b"a": 10.0, b"b": 11.0, b"c": 12.0, b"never": 13.0}
    seen = {b"a": (0, 10.1), b"b": (1, 21.5), b"c": (2, 12.2)}
    assert longest_s(committed, seen, {1, 2}) == {"longest_s": 10.5, "others_s": 0.1}
    assert longest_s(committed, seen, {5}) == {"longest_s": None, "others_s": 10.5}


def test_seconds_are_counted_from_the_beginning_even_where_nothing_happened() -> None:
    assert per_second([99.0, 100.0, 100.9, 103.2], 100.0) == [2, 0, 0, 1]
    assert per_second([], 100.0) == []


def goes(what: str, number: int, longest_s: float) -> dict[str, Any]:
    return {
        "section": "promise worker goes",
        "contender": what,
        "round": number,
        "session_s": 10.0,
        "longest_s": longest_s,
        "others_s": 0.2,
        "events": 100,
        "lost": 0,
    }


def order(what: str, reordered: int) -> dict[str, Any]:
    found = {"keys": 5, "records": 10, "lost": 0, "doubled": 0, "reordered": reordered}
    return {"section": "promise order", "contender": what, **found}


def batching(who: str, batch: int, events_per_s: int) -> dict[str, Any]:
    labels = {"section": "promise batching", "contender": who, "batch": batch}
    return labels | {"events_per_s": events_per_s}


def workers(count: int, events_per_s: int) -> dict[str, Any]:
    labels = {"section": "promise workers", "contender": f"{count}", "workers": count}
    shares = {"with_partitions": min(6, count), "idle": max(0, count - 6), "largest_share": 1}
    return (
        labels
        | shares
        | {"assignor": "range", "events_per_s": events_per_s, "cores_busy": 0.5, "lost": 0}
    )


FIGURES: list[dict[str, Any]] = [
    goes("killed", 1, 10.4),
    goes("killed", 2, 11.9),
    goes("killed", 3, 10.2),
    {"section": "promise worker goes", "contender": "killed", "round": 4, "error": "late"},
    goes("stopped", 1, 0.4),
    order("one thing", 0),
    order("another", 1),
    *(batching("relay", size, 100 * size) for size in (1, 10, 100)),
    batching("worker", 10, 900),
    workers(1, 1_000),
    workers(6, 5_900),
]


def test_rounds_are_shown_by_their_median_and_their_worst() -> None:
    rows = report.PROMISES["worker-goes"](FIGURES).rows
    assert list(rows[0]) == [
        *("killed", "3", "10.40, worst 11.90", "0.20, worst 0.20", "300", "0"),
    ]
    assert report.PROMISES["worker-goes"](FIGURES).title.endswith("after 10 s")


def test_sums_ratios_and_what_was_not_measured_are_shown() -> None:
    assert list(report.PROMISES["order"](FIGURES).rows[-1]) == [
        *("**all**", "10", "20", "0", "0", "1"),
    ]
    assert list(report.PROMISES["batching"](FIGURES).rows[0]) == ["1", "100", "-"]
    assert report.PROMISES["workers"](FIGURES).rows[1][5] == "5.90"


def test_a_promise_without_figures_shows_nothing_and_no_chart() -> None:
    assert {report.promise([], name) for name in report.PROMISES} == {""}
    assert "](charts/promise-workers.svg)" in report.promise(FIGURES, "workers")
    assert set(publish.BLOCKS[publish.PROMISES]) == {*report.PROMISES, "place", "ways"}


def test_each_chart_that_the_page_shows_is_drawn(tmp_path: Path) -> None:
    told = {"loader_per_s": 20.0, "times": 30.0, "behind": 9, **RIGHT}
    buffering = [
        {"section": "promise buffering", "contender": "before", "p50_ms": 4.0, "p99_ms": 9.0}
        | {"per_s": 12.0, "failed": 0},
        {"section": "promise buffering timeline", "contender": "ours"}
        | {"booked": [5, 0, 1], "loaded": [1, 1], **told},
    ]
    failover = [
        {"section": "promise failover", "contender": "leading relay killed", "round": 1}
        | {"session_s": 3.0, "gap_s": 1.2, "latest_s": 1.4, "events": 5}
        | {"lost": 0, "doubled": 0, "reordered": 0}
    ]
    results = Results(tmp_path / "run.json", figures=[*FIGURES, *buffering, *failover])
    written = {path.stem for path in charts.draw(results, tmp_path)}
    assert written == {f"promise-{name}" for name in report.PROMISE_CHARTS}
    for name in report.PROMISE_CHARTS:
        ET.fromstring((tmp_path / f"promise-{name}.svg").read_text("utf-8"))  # noqa: S314 - ours
        assert report.promise(results.figures, name)
