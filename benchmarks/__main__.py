"""`python -m benchmarks [SECTIONS]`: measure, show and save. Exit codes as everywhere: 0, 1, 2.

1 means that an event was lost, doubled or out of order, or that a contender failed. A figure that
is not what we want is only told.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console

from benchmarks import (
    analysts,
    booking,
    charts,
    connect,
    contenders,
    debezium,
    drain,
    fault_loaders,
    faults,
    growth,
    idle,
    jdbc_sink,
    latency,
    loader,
    onsale,
    outage,
    promises,
    quix,
    reconcile,
    report,
    scale,
    writers,
)
from benchmarks.results import Results
from benchmarks.surroundings import Surroundings, machine, surroundings
from devstack.__main__ import INTERRUPTED, ending_well
from devstack.processes import DevstackError
from devstack.state import origin
from devstack.steps import Steps

RESULTS = Path(__file__).with_name("results")
SECTIONS = (
    *("drain", "latency", "idle", "writers", "loader", "growth", "analysts", "reconcile"),
    *("booking", "onsale", "outage", "faults", "promises", "scale"),
)
# Whole figures, even where a narrow terminal breaks the lines.
TABLE_COLUMNS = 150


@dataclass(frozen=True)
class Size:
    """How much is measured: backlogs in rows, and how many seconds each rest takes."""

    rows: tuple[int, ...]
    latency_s: int
    idle_s: int
    writers_s: int
    loader_rows: int
    growth_events: tuple[int, ...]
    analysts_events: int
    reconcile_events: int
    booking_s: int
    crowd_seats: int
    outage_s: int
    outage_rounds: int
    faults_s: int
    promises_events: int
    promises_rounds: int
    scale_rows: int


SIZES = {
    "quick": Size(
        (10_000, 100_000),
        latency_s=15,
        idle_s=10,
        writers_s=5,
        loader_rows=200_000,
        growth_events=(100_000, 400_000),
        analysts_events=100_000,
        reconcile_events=100_000,
        booking_s=3,
        crowd_seats=200_000,
        outage_s=6,
        outage_rounds=1,
        faults_s=20,
        promises_events=20_000,
        promises_rounds=1,
        scale_rows=100_000,
    ),
    "standard": Size(
        (10_000, 100_000, 1_000_000),
        latency_s=60,
        idle_s=30,
        writers_s=15,
        loader_rows=1_000_000,
        growth_events=(200_000, 1_000_000),
        analysts_events=1_000_000,
        reconcile_events=1_000_000,
        booking_s=8,
        crowd_seats=5_000_000,
        outage_s=15,
        outage_rounds=3,
        faults_s=60,
        promises_events=promises.HOUR_EVENTS,
        promises_rounds=3,
        scale_rows=300_000,
    ),
    "full": Size(
        (10_000, 100_000, 1_000_000, 10_000_000),
        latency_s=60,
        idle_s=30,
        writers_s=30,
        loader_rows=2_000_000,
        growth_events=(1_000_000, 5_000_000, 10_000_000, 20_000_000),
        analysts_events=10_000_000,
        reconcile_events=10_000_000,
        booking_s=15,
        crowd_seats=5_000_000,
        outage_s=30,
        outage_rounds=4,
        faults_s=60,
        promises_events=promises.HOUR_EVENTS,
        promises_rounds=3,
        scale_rows=1_000_000,
    ),
}


@click.command()
@click.argument("sections", nargs=-1, type=click.Choice(SECTIONS))
@click.option(
    "--peers", is_flag=True, help="measure Debezium and Quix Streams too (downloads them once)"
)
@click.option("--size", type=click.Choice(list(SIZES)), default="standard", show_default=True)
@click.option(
    "--results",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    help="where the result is kept",
)
def main(sections: tuple[str, ...], size: str, folder: Path, *, peers: bool) -> None:
    """Measure every part beside what else there is; all SECTIONS unless some are named."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}-{size}"
    results = Results(folder / f"{name}.json")
    with ending_well(INTERRUPTED), Steps() as steps:
        with surroundings(steps, peers=peers) as around:
            results.machine = machine(around.stack)
            results.settings = _settings(size, peers=peers)
            for section in sections or SECTIONS:
                _measure(section, around, results, SIZES[size], peers=peers)
        steps.finish()
        report.show(results, Console(width=TABLE_COLUMNS))
        charts.draw(results, folder / name)
        click.echo(f"{results.path}, charts beside it")
        if results.faults():
            raise DevstackError("the run has failed: see the lines with ✗")


def _measure(
    section: str, around: Surroundings, results: Results, size: Size, *, peers: bool
) -> None:
    """Measure a section; what breaks it as a whole is a figure too, and the next one begins."""
    with results.tolerating({"section": section, "contender": "all"}):
        {
            "drain": lambda: drain.measure(around, results, size.rows, peers=peers),
            "latency": lambda: latency.measure(around, results, size.latency_s, peers=peers),
            "idle": lambda: idle.measure(around, results, size.idle_s),
            "writers": lambda: writers.measure(around, results, size.writers_s),
            "loader": lambda: loader.measure(
                around, results, size.loader_rows, size.latency_s, peers=peers
            ),
            "growth": lambda: growth.measure(around, results, size.growth_events),
            "analysts": lambda: analysts.measure(around, results, size.analysts_events),
            "reconcile": lambda: reconcile.measure(around, results, size.reconcile_events),
            "booking": lambda: booking.measure(around, results, size.booking_s, size.crowd_seats),
            "onsale": lambda: onsale.measure(around, results),
            "outage": lambda: outage.measure(around, results, size.outage_s, size.outage_rounds),
            "promises": lambda: promises.measure(
                around, results, size.promises_events, size.promises_rounds
            ),
            "faults": lambda: _faults(around, results, size.faults_s, peers=peers),
            "scale": lambda: scale.measure(around, results, size.scale_rows, size.booking_s),
        }[section]()


def _faults(around: Surroundings, results: Results, seconds: int, *, peers: bool) -> None:
    """Audit who publishes, then who loads."""
    faults.measure(around, results, seconds, peers=peers)
    fault_loaders.measure(around, results, seconds, peers=peers)


def _settings(size: str, *, peers: bool) -> dict[str, object]:
    """Return how everything was set that isn't the relay's default."""
    found: dict[str, object] = {
        **origin(),
        "size": size,
        **asdict(SIZES[size]),
        "raw_producer": contenders.PRODUCER,
        "raw_read_rows": contenders.READ_ROWS,
        "polling_rows": contenders.POLLING_ROWS,
        "latency_clients": latency.CLIENTS,
        "writers_clients": writers.CLIENTS,
    }
    if peers:
        found["debezium"] = {
            "version": debezium.VERSION,
            "java_options": connect.JAVA_OPTIONS,
            "connector": debezium.CONNECTOR,
            "throughput": debezium.THROUGHPUT,
            "low_latency": debezium.LOW_LATENCY,
            "exactly_once": connect.DISTRIBUTED | debezium.EXACTLY_ONCE,
        }
        found["jdbc_sink"] = {"version": jdbc_sink.VERSION, "connector": jdbc_sink.CONNECTOR}
        found["quix_streams"] = {"version": quix.VERSION, "commit_every": quix.COMMIT_ROWS}
    return found


if __name__ == "__main__":
    main()
