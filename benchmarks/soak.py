"""`python -m benchmarks.soak`: an hour of bookings through everything. Does anything grow?

Customers book at random moments at a steady rate. In each slice of it are taken: their latencies;
and in its middle, while they book, of each program its memory (shared pages by halves, thirds …, so
that a server's processes add up) and open files; of both databases the bytes that a reservation
costs with its indexes; and how many events the tables are behind. What has to be flat is compared
between the second quarter of the time, when everything is warm, and the last one.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import click
import psycopg

from benchmarks import charts
from benchmarks.results import Results
from benchmarks.shop import Hall, Shop, make_hall, own_outbox, settle, shop
from benchmarks.surroundings import Surroundings, machine, postmaster, surroundings
from devstack.__main__ import INTERRUPTED, ending_well
from devstack.processes import DevstackError, Process, descendants
from devstack.state import origin
from devstack.steps import Steps

FOLDER = Path(__file__).with_name("results")
SLICE_S = 60
HALL_SEATS = 50_000
LINES = 500
WORKERS = 2
START_TIMEOUT_S, STOP_TIMEOUT_S, LOADED_TIMEOUT_S = 30.0, 15.0, 120.0
LEAST_SLICES = 8
# Of the wanted rate, which a soak that was slowed down doesn't show to be flat.
LEAST_RATE_SHARE = 0.95
# How much more the last quarter may have than the second one, half an hour before.
MEMORY_TIMES, MEMORY_MORE_MIB = 1.05, 4.0
FILES_MORE = 8
# They keep open what they keep: a log's segments have four files each, a table one for each GB.
SERVER_FILES = {f"{server} files" for server in ("postgres", "analytics", "kafka")}
P99_TIMES, P99_MORE_MS = 1.5, 5.0
P50_TIMES, P50_MORE_MS = 1.25, 1.0
BYTES_TIMES = 1.10
# Of tables that are updated and never get longer: what grows is bloat.
UPDATED = ["outbox_relay_cursor", "load_offsets"]
UPDATED_TIMES, UPDATED_MORE_KB = 1.05, 1_024.0
BEHIND_S = 5.0

RESERVATION_BYTES = """
SELECT 'outbox', sum(pg_total_relation_size(relid))::bigint FROM pg_partition_tree('outbox')
UNION ALL SELECT name, pg_total_relation_size(name::regclass)
FROM unnest(ARRAY['reservations', 'reservation_seats', 'idempotency_keys']) AS name
"""
ANALYTICS_BYTES = """
SELECT relname, pg_total_relation_size(oid) FROM pg_class
WHERE relnamespace = 'analytics'::regnamespace AND relkind = 'r'
    AND relname IN ('fct_reservation_events', 'fct_reservations', 'fct_reservation_seats')
"""
UPDATED_BYTES = "SELECT relname, pg_total_relation_size(oid) FROM pg_class WHERE relname = ANY (%s)"
BOOKED = "SELECT count(*) FROM reservations"
LOADED = "SELECT count(*) FROM analytics.fct_reservation_events"


@dataclass(frozen=True)
class Product:
    """Everything that runs, and its databases."""

    around: Surroundings
    shop: Shop
    programs: Mapping[str, Process]

    @property
    def reservations_url(self) -> str:
        """The reservation database as its owner."""
        return self.around.owner_url

    @property
    def analytics_url(self) -> str:
        """The analysts' database as its owner."""
        return self.around.stack.environment["ANALYTICS_OWNER_DATABASE_URL"]

    def behind(self) -> int:
        """Return how many events the tables lack now."""
        with psycopg.connect(self.reservations_url) as ours:
            booked = _count(ours, BOOKED)
        with psycopg.connect(self.analytics_url) as theirs:
            return max(0, booked - _count(theirs, LOADED))

    def sample(self) -> dict[str, Any]:
        """Return what programs and tables hold."""
        found: dict[str, Any] = {"behind": self.behind()}
        for name, process in self.programs.items():
            if not process.alive:
                raise DevstackError(f"{name} has ended\n{process.log_tail()}")
        pids_of = {name: process.pid for name, process in self.programs.items()}
        pids_of |= self.around.server_pids()
        pids_of["analytics"] = postmaster(self.around.stack.analytics.admin_url)
        for name, pid in pids_of.items():
            pids = descendants(pid)
            found[f"{name} MiB"] = round(sum(map(_memory_mib, pids)), 1)
            found[f"{name} files"] = sum(map(_open_files, pids))
        with psycopg.connect(self.reservations_url) as ours:
            sizes: dict[str, int] = dict(ours.execute(RESERVATION_BYTES).fetchall())
            rows = max(1, _count(ours, BOOKED))
            updated: dict[str, int] = dict(ours.execute(UPDATED_BYTES, [UPDATED]).fetchall())
        with psycopg.connect(self.analytics_url) as theirs:
            sizes |= dict(theirs.execute(ANALYTICS_BYTES).fetchall())
            updated |= dict(theirs.execute(UPDATED_BYTES, [UPDATED]).fetchall())
        found |= {f"{name} kB": round(size / 1_000, 1) for name, size in updated.items()}
        return found | {f"{name} bytes": round(size / rows, 1) for name, size in sizes.items()}


@click.command()
@click.option(
    "--duration-s",
    type=click.IntRange(min=LEAST_SLICES * SLICE_S),
    default=3_600,
    show_default=True,
)
@click.option("--rate", type=click.IntRange(min=1), default=300, show_default=True)
@click.option(
    "--results", "folder", type=click.Path(file_okay=False, path_type=Path), default=FOLDER
)
def main(duration_s: int, rate: int, folder: Path) -> None:
    """Book at RATE for DURATION_S seconds; exit 1 when something isn't flat, failed or is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}-soak"
    results = Results(folder / f"{name}.json")
    with ending_well(INTERRUPTED), Steps() as steps:
        with surroundings(steps, peers=False) as around, own_outbox(around), ExitStack() as cleanup:
            results.machine = machine(around.stack)
            results.settings = {
                **origin(),
                "size": f"{duration_s:,} s",
                "rate": rate,
                "slice_s": SLICE_S,
            }
            product = _begin(around, cleanup)
            for figure in _slices(product, duration_s, rate):
                results.add({"section": "soak", "contender": "ours"} | figure)
                steps.console.print(_line(figure), highlight=False, soft_wrap=True)
            lost = _await_loaded(product)
        slices = [figure for figure in results.figures if figure["section"] == "soak"]
        found = [*problems(slices, rate), *([f"{lost} events never came"] if lost else [])]
        booked = sum(figure["booked"] for figure in slices)
        verdict = {"booked": booked, "lost": lost, "problems": found}
        results.add({"section": "soak verdict", "contender": "ours"} | verdict)
        charts.draw(results, folder / name)
        click.echo(f"{booked:,} bookings, {lost} lost; {'; '.join(found) or 'flat'}")
        click.echo(f"{results.path}, charts beside it")
        if found:
            raise DevstackError("not flat: see above")


def _begin(around: Surroundings, cleanup: ExitStack) -> Product:
    around.stack.analytics.start()
    settle(around.admin_url)
    open_shop = cleanup.enter_context(shop(around))
    programs = {"service": open_shop.process}
    for name, *command in (
        ("sweeper", "reservation_service", "expire-holds", "--every", "5"),
        ("relay", "outbox_relay", "run"),
        *((f"worker {number}", "data_platform", "run") for number in range(1, WORKERS + 1)),
    ):
        process = around.program(*command, name=f"soak-{name.replace(' ', '-')}")
        cleanup.callback(process.stop, STOP_TIMEOUT_S)
        programs[name] = process
    return Product(around, open_shop, programs)


def _slices(product: Product, duration_s: int, rate: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of each slice of the load."""
    began_s = time.monotonic()
    hall: Hall | None = None
    while (left_s := duration_s - (time.monotonic() - began_s)) > 1:
        seconds = min(SLICE_S, left_s)
        wanted = round(rate * seconds * 1.2) + 100
        if hall is None or hall.taken + wanted > hall.seats:
            hall = make_hall(product.reservations_url, max(HALL_SEATS, wanted))
        with ThreadPoolExecutor(1) as pool:
            booking = pool.submit(
                product.shop.book,
                hall,
                at_most=wanted,
                rate=rate,
                seconds=seconds,
                lines=min(LINES, rate),
            )
            wait([booking], timeout=seconds / 2)
            sample = product.sample()
            found = booking.result()
        answers = found["answers"]
        booked = answers.get("201", 0)
        yield {
            "at_s": round(time.monotonic() - began_s),
            "booked": booked,
            # By how long it took: who is slower takes longer, and books them all in the end.
            "per_s": round(booked / max(seconds, found["seconds"]), 1),
            "failed": sum(answers.values()) - booked,
            "p50_ms": found["p50_ms"],
            "p99_ms": found["p99_ms"],
            **sample,
        }


def _await_loaded(product: Product) -> int:
    """Wait for the last events; return how many never came."""
    until_s = time.monotonic() + LOADED_TIMEOUT_S
    while (behind := product.behind()) and time.monotonic() < until_s:
        time.sleep(0.2)
    return behind


def problems(slices: Sequence[Mapping[str, Any]], rate: int) -> list[str]:
    """Name what isn't flat; `slices` in the order of time.

    Raises:
        DevstackError: there are too few to tell.
    """
    if len(slices) < LEAST_SLICES:
        raise DevstackError("too few slices to tell whether anything is flat: run for longer")
    bounds: dict[str, Callable[[float], float]] = {
        " MiB": lambda value: value * MEMORY_TIMES + MEMORY_MORE_MIB,
        " files": lambda value: value + FILES_MORE,
        " bytes": lambda value: value * BYTES_TIMES,
        " kB": lambda value: value * UPDATED_TIMES + UPDATED_MORE_KB,
        "p50_ms": lambda value: value * P50_TIMES + P50_MORE_MS,
        "p99_ms": lambda value: value * P99_TIMES + P99_MORE_MS,
    }
    found = []
    for name, (before, after) in quarters(slices).items():
        if name in SERVER_FILES:
            continue
        for ending, bound in bounds.items():
            if name.endswith(ending) and after > bound(before):
                found.append(f"{name} grew from {before:g} to {after:g}")
    # In every slice but the last, which may be short: half of them would do for a median.
    reached = min(part["per_s"] for part in slices[:-1])
    if reached < rate * LEAST_RATE_SHARE:
        found.append(f"only {reached:g} bookings a second of {rate}")
    failed = sum(part["failed"] for part in slices)
    if failed:
        found.append(f"{failed} bookings failed")
    behind = quarters(slices)["behind"][1]
    if behind > rate * BEHIND_S:
        found.append(f"the tables are {behind:,.0f} events behind")
    return found


def quarters(slices: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return each figure's median in the second and in the last quarter of the slices."""
    quarter = len(slices) // 4
    warm, last = slices[quarter : 2 * quarter], slices[-quarter:]
    return {
        name: (median(part[name] for part in warm), median(part[name] for part in last))
        for name, value in slices[0].items()
        if isinstance(value, int | float) and name != "at_s"
    }


def _line(figure: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in figure.items() if " bytes" not in name})


def _count(connection: psycopg.Connection, statement: str) -> int:
    return int((connection.execute(statement.encode()).fetchone() or (0,))[0])


def _memory_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0  # it has just ended
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _open_files(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return 0


if __name__ == "__main__":
    main()
