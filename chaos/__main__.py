"""`python -m chaos`: faults at full size, for people. Exit codes as everywhere: 0, 1, 2.

The whole product by default; `--only` strikes two relays, or three workers, more densely.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from chaos import disks, loader, relay, report, whole
from chaos.gauges import Gauges
from chaos.ledger import Ledger
from chaos.product import Size
from chaos.relay import Outcome
from chaos.schedule import plan
from chaos.strikes import natures
from devstack.__main__ import INTERRUPTED, ending_well
from devstack.kafka import KafkaCluster
from devstack.parts import new_kafka, new_postgres
from devstack.state import Run, home
from devstack.steps import Steps
from tests.databases import create_reservation_database
from tests.outbox_relay.scenes import ExactlyOnceOutbox, make_outbox

FULL_EVENTS = 1_000_000
FULL_LOADER_EVENTS = 500_000
FULL_DURATION_S = 600
PARTITIONS = 6
DELIVERIES = ("exactly_once", "at_least_once")


@click.command()
@click.option("--duration-s", type=click.IntRange(10), default=FULL_DURATION_S, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--rate", type=click.FloatRange(1), default=40, show_default=True, help="bookings/s")
@click.option("--delivery", type=click.Choice(DELIVERIES), default=DELIVERIES[0], show_default=True)
@click.option("--only", type=click.Choice(["relay", "loader"]), help="default: the whole product")
@click.option("--events", type=click.IntRange(1), help="with --only; default: by the duration")
def main(
    *, duration_s: int, seed: int, rate: float, delivery: str, only: str | None, events: int | None
) -> None:
    """Break everything while clients book; nothing may be lost, doubled or out of order."""
    if only == "relay":
        wanted = events or FULL_EVENTS * duration_s // FULL_DURATION_S
        good = relays(seconds=duration_s, events=wanted, seed=seed)
    elif only == "loader":
        wanted = events or FULL_LOADER_EVENTS * duration_s // FULL_DURATION_S
        good = workers(seconds=duration_s, events=wanted, seed=seed)
    else:
        good = everything(seconds=duration_s, seed=seed, rate=rate, delivery=delivery)
    sys.exit(0 if good else 1)


def everything(*, seconds: int, seed: int, rate: float, delivery: str) -> bool:
    """Strike the whole product; say whether every place agrees with what clients were told."""
    results = home() / "chaos" / f"whole-{seed}"
    results.mkdir(parents=True, exist_ok=True)
    # A run that doesn't come to its end must not leave an older one's outcome to be published.
    (results / "outcome.json").unlink(missing_ok=True)
    console = report.console()
    disks.enter_own_mounts()
    with ending_well(INTERRUPTED), Steps() as steps:

        def progress(now_s: float, present: str, gauges: Gauges, ledger: Ledger) -> None:
            counts = (gauges.committed, gauges.published, gauges.loaded)
            said = " → ".join(f"{curve.counts[-1] if curve.counts else 0:,}" for curve in counts)
            steps.console.print(
                f"  {now_s:4.0f} s  told {len(ledger.told):,}  events {said}  {present or 'calm'}",
                highlight=False,
                soft_wrap=True,
            )

        outcome = whole.run(
            plan(natures(), duration_s=seconds, seed=seed),
            seconds=seconds,
            seed=seed,
            size=Size(),
            load=whole.Load(rate=rate),
            steps=steps,
            delivery=delivery,
            doubles_allowed=delivery == "at_least_once",
            progress=progress,
            keep_logs=lambda product: whole.keep(product.logs(), results),
        )
    report.show(outcome, console)
    report.write(outcome, results)
    console.print(f"report, charts and logs: {results}", highlight=False, soft_wrap=True)
    return outcome.good


def workers(*, seconds: int, events: int, seed: int) -> bool:
    """Strike three workers and their database; say whether the tables are right."""
    with ending_well(INTERRUPTED), ExitStack() as cleanup:
        steps = cleanup.enter_context(Steps())
        run = cleanup.enter_context(Run())
        with steps.step("Postgres and a broker"):
            server, cluster = new_postgres(run, "analytics"), new_kafka(run, "kafka", 1)
            for part in (server, cluster):
                cleanup.callback(part.close)
            server.start()
            cluster.start()
        steps.finish()
        results = home() / "chaos" / f"loader-{seed}"
        results.mkdir(parents=True, exist_ok=True)
        with progress_bar(events) as show:
            try:
                outcome = loader.run(
                    server,
                    cluster,
                    run.path,
                    seconds=seconds,
                    events=events,
                    seed=seed,
                    progress=show,
                )
            finally:
                for log in run.path.glob("worker-*.log"):
                    shutil.copy(log, results)
    found = outcome.as_json()
    table = Table("what", "found", title=f"three workers, seed {seed}, {outcome.seconds:g} s")
    for name, value in {**found.pop("strikes"), **found}.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int | float) else str(value))
    console = Console()
    console.print(table)
    file = results / "outcome.json"
    file.write_text(json.dumps(outcome.as_json(), indent=2) + "\n", encoding="utf-8")
    console.print(f"figures and logs: {results}", highlight=False, soft_wrap=True)
    return outcome.good


def relays(*, seconds: int, events: int, seed: int) -> bool:
    """Strike two relays and three brokers; say whether every event was published once."""
    with ending_well(INTERRUPTED), ExitStack() as cleanup:
        steps = cleanup.enter_context(Steps())
        run = cleanup.enter_context(Run())
        with steps.step("Postgres and three brokers"):
            server, cluster = new_postgres(run, "reservations"), new_kafka(run, "kafka", 3)
            for part in (server, cluster):
                cleanup.callback(part.close)
            server.start()
            cluster.start()
        steps.finish()
        outbox = make_outbox(create_reservation_database(server), cluster, partitions=PARTITIONS)
        results = home() / "chaos" / f"relay-{seed}"
        results.mkdir(parents=True, exist_ok=True)
        try:
            outcome = watched(outbox, cluster, run.path, seconds=seconds, events=events, seed=seed)
        finally:
            for log in run.path.glob("relay-*.log"):
                shutil.copy(log, results)
    show_relays(outcome, results)
    return outcome.good


def watched(
    outbox: ExactlyOnceOutbox,
    cluster: KafkaCluster,
    logs: Path,
    *,
    seconds: int,
    events: int,
    seed: int,
) -> Outcome:
    """Run with a progress bar on standard error."""
    with progress_bar(events) as show:
        return relay.run(
            outbox, cluster, logs, seconds=seconds, events=events, seed=seed, progress=show
        )


@contextmanager
def progress_bar(events: int) -> Iterator[Callable[[int, int], None]]:
    """Yield what shows how many events and faults there were."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("events", total=events)

        def show(written: int, strikes: int) -> None:
            bar.update(task, completed=min(written, events), description=f"{strikes} faults")

        yield show


def show_relays(outcome: Outcome, results: Path) -> None:
    """Print the table, and keep the figures as JSON."""
    verdict = outcome.verdict
    table = Table(title=f"two relays, seed {outcome.seed}, {outcome.seconds:g} s")
    table.add_column("what")
    table.add_column("count", justify="right")
    for fault, count in sorted(outcome.strikes.items()):
        table.add_row(fault, f"{count:,}")
    table.add_row("terms begun", f"{outcome.terms:,}")
    table.add_row("events committed", f"{verdict.committed:,}", end_section=True)
    for name in ("lost", "doubled", "reordered", "invented"):
        count = getattr(verdict, name)
        table.add_row(name, f"[{'red' if count else 'green'}]{count:,}")
    console = Console()
    console.print(table)
    file = results / "outcome.json"
    file.write_text(json.dumps(outcome.as_json(), indent=2) + "\n", encoding="utf-8")
    console.print(f"figures and logs: {results}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
