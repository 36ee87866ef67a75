"""Figures are judged as they were asked for, kept as they come, and shown whatever is missing."""

import json
import xml.etree.ElementTree as ET
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import charts, publish, report
from benchmarks.goals import goals
from benchmarks.latency import quantiles
from benchmarks.results import Results, combined, load
from devstack.processes import DevstackError
from devstack.state import REPOSITORY


def drained(contender: str, rows: int, events_per_s: int, **more: Any) -> dict[str, Any]:
    return {
        "section": "drain",
        "rows": rows,
        "open_transaction": False,
        "contender": contender,
        "events_per_s": events_per_s,
        "us_per_event": 1e6 / events_per_s,
        "lost": 0,
        "doubled": 0,
        "reordered": 0,
    } | more


SPEEDS = {
    "raw-read": 400_000,
    "raw-produce": 300_000,
    "at_least_once": 250_000,
    "exactly_once": 200_000,
    "debezium": 80_000,
}
LATENCY = {"p50_ms": 4.0, "p95_ms": 7.0, "p99_ms": 9.0, "p999_ms": 12.0, "max_ms": 20.0}
FIGURES = [
    *(drained(name, rows, speed) for name, speed in SPEEDS.items() for rows in (10_000, 1_000_000)),
    drained("at_least_once", 10_000_000, 260_000, peak_mib=140.0),
    *(
        {"section": "latency", "contender": name, "rate": rate, **LATENCY}
        for name in ("at_least_once", "exactly_once", "debezium")
        for rate in (500, 2_000)
    ),
    {
        "section": "idle",
        "contender": "exactly_once",
        "cpu_percent": 0.9,
        "postgres_cpu_percent": 0.4,
        "postgres_connections": 3,
        "first_row_ms": 31.0,
        "later_rows": LATENCY,
    },
    {"section": "writers", "contender": "no relay", "transactions_per_s": 8_000},
    {"section": "writers", "contender": "exactly_once", "transactions_per_s": 7_400, "ratio": 0.92},
    {"section": "drain", "rows": 10_000, "contender": "polling", "error": "TimeoutError: late"},
]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "run.json", figures=[dict(figure) for figure in FIGURES])


def test_ratios_are_taken_at_the_largest_backlog_that_both_have_drained() -> None:
    found = {goal.what: goal for goal in goals(FIGURES)}
    against_debezium = found["drain at_least_once against debezium at 1,000,000 rows"]
    assert (against_debezium.found, against_debezium.reached) == (3.12, True)
    exactly = found["drain exactly_once against debezium at 1,000,000 rows"]
    assert (exactly.found, exactly.wanted, exactly.reached) == (2.5, 2.5, True)
    limit = "drain exactly_once against the slower of raw-read, raw-produce at 1,000,000 rows"
    assert (found[limit].found, found[limit].reached) == (0.67, False)


def test_limits_are_judged_in_their_own_direction_and_what_is_missing_is_not() -> None:
    found = {goal.what: goal.reached for goal in goals(FIGURES)}
    assert found["latency exactly_once p99 at 500/s"]
    assert found["latency at_least_once p50 against debezium at 500/s"]
    assert found["writers beside exactly_once, against without"]
    assert found["idle CPU of exactly_once"]
    assert found["row after a quiet time, exactly_once"] is False
    assert found["peak memory of at_least_once"]  # 140 MiB are 146.8 MB
    assert found["idle CPU of at_least_once"] is None
    assert set(map(type, {goal.reached for goal in goals([])})) == {type(None)}


def test_a_run_has_failed_when_an_event_is_wrong_or_a_contender_failed(results: Results) -> None:
    results.figures.append(drained("exactly_once", 100, 10, doubled=2))
    assert results.faults() == [
        "drain 10000 polling: TimeoutError: late",
        "drain 100 exactly_once: 2 doubled",
    ]


def test_a_failure_is_kept_and_tells_no_path_of_this_machine(results: Results) -> None:
    def fail() -> dict[str, Any]:
        raise DevstackError(f"cannot read {REPOSITORY}/x\n  Traceback\n  ValueError: y")

    results.attempt({"section": "drain", "contender": "debezium"}, fail)
    kept = load(results.path)
    assert kept.figures[-1]["error"] == "DevstackError: cannot read …/x / ValueError: y"
    assert str(REPOSITORY) not in results.path.read_text("utf-8")
    assert kept.content() == json.loads(results.path.read_text("utf-8"))


def test_what_nobody_expected_ends_the_run(results: Results) -> None:
    def fail() -> dict[str, Any]:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        results.attempt({"section": "drain"}, fail)


def test_all_figures_are_shown_failed_ones_too(results: Results) -> None:
    shown = StringIO()
    report.show(results, Console(file=shown, width=160))
    text = shown.getvalue()
    for part in ("10,000,000 at_least_once", "2,000/s debezium", "failed", "not measured", "31.0"):
        assert part in text
    assert report.markdown(results).count("\n\n**") == 4  # five tables


def test_nothing_is_shown_of_nothing(tmp_path: Path) -> None:
    empty = Results(tmp_path / "run.json")
    assert [sheet.title for sheet in report.sheets(empty)] == ["Must reach"]
    assert charts.draw(empty, tmp_path / "charts") == []


def test_charts_are_svg_without_scripts_and_the_same_for_the_same_figures(
    results: Results, tmp_path: Path
) -> None:
    written = charts.draw(results, tmp_path / "charts")
    assert {path.name for path in written} == {"drain.svg", "cost-per-event.svg", "latency.svg"}
    for path in written:
        ET.fromstring(path.read_text("utf-8"))  # noqa: S314 - our own
        assert "<script" not in path.read_text("utf-8")
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in charts.draw(results, tmp_path / "charts")] == first


def test_figures_are_put_between_the_marks_and_nowhere_else() -> None:
    other = "<!-- figures b: begin -->\nkept\n<!-- figures b: end -->\n"
    document = f"before\n<!-- figures a: begin -->\nold\n<!-- figures a: end -->\nafter\n{other}"
    once = publish.with_figures(document, "a", "new")
    assert once == document.replace("old", "new")
    assert publish.with_figures(once, "a", "new") == once
    for missing in ("c", "begin"):
        with pytest.raises(ValueError, match=f"figures {missing}: begin"):
            publish.with_figures(document, missing, "new")


def test_quantiles_are_the_nearest_rank_in_milliseconds() -> None:
    found = quantiles([number / 1000 for number in range(1000, 0, -1)])
    assert found == {
        "p50_ms": 500,
        "p95_ms": 950,
        "p99_ms": 990,
        "p999_ms": 999,
        "max_ms": 1000,
    }
    assert quantiles([0.002])["p999_ms"] == 2


def test_of_several_runs_each_section_is_published_whole_from_the_last_that_has_it() -> None:
    drain = [{"section": "drain", "contender": name, "run": 1} for name in ("a", "b")]
    idle, again = ({"section": "idle", "contender": "a", "run": run} for run in (1, 2))
    first = {"settings": {"date": "1", "size": "quick", "commit": "a"}, "figures": [*drain, idle]}
    second = {"settings": {"date": "2"}, "figures": [again]}
    origins = {
        "drain": {"date": "1", "size": "quick", "commit": "a"},
        "idle": {"date": "2", "size": "not noted", "commit": "not noted"},
    }
    expected = {**first, "figures": [*drain, again], "origins": origins}
    assert combined([first, second]) == expected
    assert combined([expected, {"settings": {}, "figures": []}]) == expected


def test_the_documents_show_the_published_figures_and_nothing_typed_in() -> None:
    results = load(publish.PUBLISHED)
    for document, blocks in publish.BLOCKS.items():
        text = document.read_text("utf-8")
        for name, told in blocks.items():
            assert text == publish.with_figures(text, name, told(results)), (document.name, name)
