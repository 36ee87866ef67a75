"""A capacity grows with the rate and with what an event costs, and never from a missing figure."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.capacity import (
    DOCUMENT,
    RATES,
    REPLICAS,
    UTILISATION,
    MissingFigureError,
    Weights,
    blocks,
    brokers,
    capacity,
    limits,
    reservation_databases,
    weights,
)
from benchmarks.publish import PUBLISHED, with_figures
from benchmarks.results import Results, load
from benchmarks.split import SECTION

ROWS = 1_000_000
FIGURES: list[dict[str, Any]] = [
    {
        "section": "drain",
        "rows": ROWS,
        "open_transaction": False,
        "contender": "exactly_once",
        "cpu_us_per_event": 6.0,
        "events_per_s": 100_000,
        "postgres_cpu_s": 2.0,
        "kafka_cpu_s": 3.0,
    },
    {
        "section": "loader",
        "rows": ROWS,
        "contender": "star",
        "events_per_s": 50_000,
        "cpu_us_per_event": 16.0,
        "postgres_us_per_event": 10.0,
        "kafka_us_per_event": 1.0,
    },
    {
        "section": "booking",
        "contender": "booking",
        "service_cpu_us": 800.0,
        "postgres_cpu_us": 700.0,
    },
    {"section": "scale", "contender": "booking", "wal_bytes": 3000.0, "table_bytes": 2500.0},
    {
        "section": "scale",
        "contender": "sizes",
        "log_bytes": 120.0,
        "analytics_wal_bytes": 1000.0,
        "analytics_bytes": 900.0,
    },
    {
        "section": "scale",
        "contender": "exactly_once",
        "delay_ms": 0,
        "rows": ROWS,
        "kafka_sent_bytes": 122.0,
        "events_per_s": 90_000,
    },
]
SIZES = {"payload_bytes": 976.0, "key_bytes": 36.0, "headers_bytes": 85.0}


def run(figures: list[dict[str, Any]]) -> Results:
    machine = {"cpus": 2, "cpu": "a", "postgres": "b", "kafka": "c"}
    return Results(Path("unused"), machine, {"date": "2026-01-01"}, SIZES, figures)


@pytest.fixture
def measured() -> Weights:
    return weights(run(FIGURES))


def test_a_figure_that_is_missing_is_an_error_that_names_it() -> None:
    used = 0
    for number, figure in enumerate(FIGURES):
        for field in [name for name in figure if name.endswith(("_us", "_bytes", "_event", "_s"))]:
            without = {name: value for name, value in figure.items() if name != field}
            others = [*FIGURES[:number], without, *FIGURES[number + 1 :]]
            if figure["section"] == "scale" and field == "events_per_s":
                continue  # shown, not counted with
            with pytest.raises(MissingFigureError, match=field):
                weights(run(others))
            used += 1
    assert used == len(fields(Weights)) - 1  # all but what comes from the events' sizes


def test_a_part_that_failed_counts_as_missing() -> None:
    failed = [FIGURES[0] | {"error": "TimeoutError"}, *FIGURES[1:]]
    with pytest.raises(MissingFigureError):
        weights(run(failed))


def test_events_without_a_size_are_an_error() -> None:
    with pytest.raises(MissingFigureError, match="payload_bytes"):
        weights(replace(run(FIGURES), sizes={}))


def test_every_part_is_busy_for_no_more_than_its_share(measured: Weights) -> None:
    each = limits(measured)
    for rate in RATES:
        per_relay = rate / reservation_databases(each, rate)
        assert per_relay <= UTILISATION * measured.relay_per_s
        assert per_relay * (measured.booking_us + measured.read_us) <= UTILISATION * 32e6
        assert rate / each["worker"].wanted(rate) <= UTILISATION * measured.worker_per_s
        assert brokers(each, rate) >= REPLICAS


def test_ten_times_the_events_want_ten_times_the_parts(measured: Weights) -> None:
    each = limits(measured)
    for limit in each.values():
        few, many = limit.wanted(100_000), limit.wanted(1_000_000)
        assert 10 * few - 10 < many <= 10 * few


@pytest.mark.parametrize(
    ("part", "dearer"),
    [
        ("relay", lambda found: replace(found, relay_per_s=found.relay_per_s / 2)),
        ("worker", lambda found: replace(found, worker_per_s=found.worker_per_s / 2)),
        ("reservation database", lambda found: replace(found, booking_us=2 * found.booking_us)),
        ("reservation database", lambda found: replace(found, booking_wal_bytes=1e6)),
        ("broker", lambda found: replace(found, plain_bytes=10 * found.plain_bytes)),
        ("analysts' database", lambda found: replace(found, analytics_wal_bytes=1e5)),
        ("analysts' database", lambda found: replace(found, analytics_us=1e3)),
    ],
)
def test_one_does_less_of_what_is_dearer(
    measured: Weights, part: str, dearer: Callable[[Weights], Weights]
) -> None:
    assert limits(dearer(measured))[part].per_s < limits(measured)[part].per_s


def test_what_binds_is_named(measured: Weights) -> None:
    assert limits(replace(measured, analytics_wal_bytes=1e6))["analysts' database"].by == "WAL"
    assert limits(replace(measured, analytics_us=1e3))["analysts' database"].by == "cores"


def test_the_table_has_a_cell_for_each_rate(measured: Weights) -> None:
    sheet = capacity(measured)
    assert all(len(row) == len(sheet.headings) == 1 + len(RATES) for row in sheet.rows)


def test_the_document_has_a_place_for_each_block_and_shows_what_is_published() -> None:
    results = load(PUBLISHED)
    text = DOCUMENT.read_text("utf-8")
    measured = any(figure["section"] == SECTION for figure in results.figures)
    for name, told in blocks(results if measured else run(FIGURES)).items():
        assert with_figures(text, name, told if measured else "") == text
