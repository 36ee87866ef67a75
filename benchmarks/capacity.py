"""`python -m benchmarks.capacity [RESULT]`: how many machines so many events a second want.

Multiplies what was measured of one event on one machine; what it assumes of the machines is said in
the table's own lines. A figure that was not measured is an error, never a zero.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import click

from benchmarks import report
from benchmarks.loader import STARS
from benchmarks.publish import PUBLISHED, with_figures
from benchmarks.report import Sheet
from benchmarks.results import Results, find, load
from benchmarks.split import SECTION
from devstack.state import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "scale.md"
CHART = "![Events per second by the round trip](charts/distance.svg)"
RATES = (10_000, 100_000, 1_000_000)
# Assumed, not measured: what a machine has, and how much of it work may take.
UTILISATION = 0.5
DATABASE_CORES, BROKER_CORES = 32, 16
NETWORK_BYTES_PER_S = 10e9 / 8
DISK_BYTES_PER_S = 500e6
REPLICAS = 3
SECTIONS = {"drain", "loader", "booking", SECTION}
DAY_S = 86_400
MICROSECONDS = 1e6


class MissingFigureError(click.ClickException):
    """A figure that the capacity stands on was not measured."""


@dataclass(frozen=True)
class Weights:
    """What one event costs each part: CPU in µs, bytes, and how many a second one of them does."""

    service_us: float
    booking_us: float
    booking_wal_bytes: float
    booking_bytes: float
    relay_us: float
    read_us: float
    relay_per_s: float
    produced_us: float
    produced_bytes: float
    log_bytes: float
    plain_bytes: float
    fetched_us: float
    worker_us: float
    worker_per_s: float
    analytics_us: float
    analytics_wal_bytes: float
    analytics_bytes: float

    @property
    def broker_us(self) -> float:
        """In all brokers: a replica costs what the only one did, and is fetched as by a worker."""
        return REPLICAS * (self.produced_us + self.fetched_us)

    @property
    def broker_network_bytes(self) -> float:
        """In and out of all brokers: from the relay, to each follower and from it, to a worker.

        As if nothing were compressed: events that are made from templates compress too well.
        """
        return 2 * REPLICAS * self.plain_bytes

    @property
    def broker_disk_bytes(self) -> float:
        """Written by all brokers, not compressed either."""
        return REPLICAS * self.plain_bytes


@dataclass(frozen=True)
class Limit:
    """How many events a second one of a part does within UTILISATION, and what stops it there."""

    per_s: float
    by: str

    def wanted(self, rate: float) -> int:
        """Return how many of the part a rate wants."""
        return ceil(rate / self.per_s)


def weights(results: Results) -> Weights:
    """Take each weight from the section that measures it.

    Raises:
        MissingFigureError: it was not measured.
    """
    figures = results.figures
    sizes = [f["rows"] for f in figures if f["section"] == "drain" and not f.get("error")]
    drained = {"section": "drain", "rows": max(sizes, default=0), "open_transaction": False}
    relay = drained | {"contender": "exactly_once"}
    star = {"section": "loader", "contender": STARS[0]}
    booking = {"section": "booking", "contender": "booking"}
    left = {"section": SECTION, "contender": "booking"}
    weighed = {"section": SECTION, "contender": "sizes"}
    near = {"section": SECTION, "contender": "exactly_once", "delay_ms": 0}

    def take(field: str, labels: dict[str, Any]) -> float:
        found = find(figures, **labels)
        if found is None or not found.get(field):
            named = " ".join(str(value) for value in labels.values())
            raise MissingFigureError(f"{field} of {named} was not measured")
        return float(found[field])

    rows = take("rows", relay)
    if not results.sizes.get("payload_bytes"):
        raise MissingFigureError("payload_bytes of an event was not measured")
    return Weights(
        service_us=take("service_cpu_us", booking),
        booking_us=take("postgres_cpu_us", booking),
        booking_wal_bytes=take("wal_bytes", left),
        booking_bytes=take("table_bytes", left),
        relay_us=take("cpu_us_per_event", relay),
        read_us=take("postgres_cpu_s", relay) / rows * MICROSECONDS,
        relay_per_s=take("events_per_s", relay),
        produced_us=take("kafka_cpu_s", relay) / rows * MICROSECONDS,
        produced_bytes=take("kafka_sent_bytes", near),
        log_bytes=take("log_bytes", weighed),
        plain_bytes=sum(
            results.sizes[name] for name in ("payload_bytes", "key_bytes", "headers_bytes")
        ),
        fetched_us=take("kafka_us_per_event", star),
        worker_us=take("cpu_us_per_event", star),
        worker_per_s=take("events_per_s", star),
        analytics_us=take("postgres_us_per_event", star),
        analytics_wal_bytes=take("analytics_wal_bytes", weighed),
        analytics_bytes=take("analytics_bytes", weighed),
    )


def limits(found: Weights) -> dict[str, Limit]:
    """Return what one of each part does."""

    def lowest(**per_s: float) -> Limit:
        by = min(per_s, key=lambda name: per_s[name])
        return Limit(UTILISATION * per_s[by], by.replace("_", " "))

    database = DATABASE_CORES * MICROSECONDS
    return {
        "service": lowest(one_core=MICROSECONDS / found.service_us),
        "relay": lowest(measured_speed=found.relay_per_s, one_core=MICROSECONDS / found.relay_us),
        "reservation database": lowest(
            cores=database / (found.booking_us + found.read_us),
            WAL=DISK_BYTES_PER_S / found.booking_wal_bytes,
        ),
        "broker": lowest(
            cores=BROKER_CORES * MICROSECONDS / found.broker_us,
            # Of a full duplex network one direction, which has half of it.
            network=NETWORK_BYTES_PER_S / (found.broker_network_bytes / 2),
            disk=DISK_BYTES_PER_S / found.broker_disk_bytes,
        ),
        "worker": lowest(
            measured_speed=found.worker_per_s, one_core=MICROSECONDS / found.worker_us
        ),
        "analysts' database": lowest(
            cores=database / found.analytics_us,
            WAL=DISK_BYTES_PER_S / found.analytics_wal_bytes,
        ),
    }


def reservation_databases(each: dict[str, Limit], rate: float) -> int:
    """Return how many there must be: each has one relay, whichever of both is the slower."""
    return max(each[part].wanted(rate) for part in ("relay", "reservation database"))


def brokers(each: dict[str, Limit], rate: float) -> int:
    """Return how many there must be: no fewer than replicas."""
    return max(REPLICAS, each["broker"].wanted(rate))


def capacity(found: Weights) -> Sheet:
    """Return what each rate wants, line by line."""
    each = limits(found)

    def cores(us: float) -> list[str]:
        return [f"{rate * us / MICROSECONDS / UTILISATION:,.1f}" for rate in RATES]

    def bytes_per_s(size: float) -> list[str]:
        return [_bytes(rate * size) + "/s" for rate in RATES]

    def bytes_per_day(size: float) -> list[str]:
        return [_bytes(rate * size * DAY_S) for rate in RATES]

    def count(part: str) -> list[str]:
        return [f"{each[part].wanted(rate):,}" for rate in RATES]

    rows = [
        ("service: cores", *cores(found.service_us)),
        (
            "reservation databases, a relay each",
            *(f"{reservation_databases(each, rate):,}" for rate in RATES),
        ),
        ("… cores of their Postgres", *cores(found.booking_us + found.read_us)),
        ("… cores of their relays", *cores(found.relay_us)),
        ("… their WAL", *bytes_per_s(found.booking_wal_bytes)),
        ("… their tables grow a day by", *bytes_per_day(found.booking_bytes)),
        ("brokers", *(f"{brokers(each, rate):,}" for rate in RATES)),
        ("… their cores", *cores(found.broker_us)),
        ("… their network, in and out", *bytes_per_s(found.broker_network_bytes)),
        (f"… their disks, {REPLICAS} replicas", *bytes_per_s(found.broker_disk_bytes)),
        ("… their log grows a day by", *bytes_per_day(found.broker_disk_bytes)),
        ("partitions at least", *count("worker")),
        ("workers", *count("worker")),
        ("… their cores", *cores(found.worker_us)),
        ("analysts' databases", *count("analysts' database")),
        ("… their cores", *cores(found.analytics_us)),
        ("… their WAL", *bytes_per_s(found.analytics_wal_bytes)),
        ("… their tables grow a day by", *bytes_per_day(found.analytics_bytes)),
    ]
    title = (
        f"Machines at most {UTILISATION:.0%} busy: databases of {DATABASE_CORES} cores, brokers of "
        f"{BROKER_CORES}, {NETWORK_BYTES_PER_S * 8 / 1e9:.0f} Gbit/s, disks that write "
        f"{_bytes(DISK_BYTES_PER_S)}/s (assumed)"
    )
    headings = ("part", *(f"{rate:,}/s" for rate in RATES))
    return Sheet(title, headings, rows)


MOVED_BY = {
    "service": "another process: it keeps nothing",
    "relay": "another reservation database with a relay of its own",
    "reservation database": "another one: performances are independent of each other",
    "broker": "another broker, partitions moved to it",
    "worker": "another worker, up to the number of partitions",
    "analysts' database": "several, each with some of the partitions; or a columnar store",
}


def edges(found: Weights) -> Sheet:
    """Return where the limit of one of each part lies, and what moves it."""
    rows = [
        (part, f"{limit.per_s:,.0f}", limit.by, MOVED_BY[part])
        for part, limit in limits(found).items()
    ]
    title = f"What one of each does within {UTILISATION:.0%}"
    return Sheet(title, ("part", "events/s", "bound by", "moved by"), rows)


def inputs(found: Weights) -> Sheet:
    """Return what was measured of an event."""
    rows = [
        ("service (a booking)", f"{found.service_us:,.1f}", "-"),
        (
            "reservation Postgres (a booking with its event)",
            f"{found.booking_us:,.1f}",
            f"{found.booking_wal_bytes:,.0f} of WAL, {found.booking_bytes:,.0f} stored",
        ),
        ("reservation Postgres (read by the relay)", f"{found.read_us:,.1f}", "-"),
        ("relay", f"{found.relay_us:,.1f}", f"{found.produced_bytes:,.0f} sent to Kafka"),
        (
            "Kafka, produced",
            f"{found.produced_us:,.1f}",
            f"{found.log_bytes:,.0f} in the log; {found.plain_bytes:,.0f} not compressed",
        ),
        ("Kafka, fetched", f"{found.fetched_us:,.1f}", "-"),
        ("worker", f"{found.worker_us:,.1f}", "-"),
        (
            "analysts' Postgres",
            f"{found.analytics_us:,.1f}",
            f"{found.analytics_wal_bytes:,.0f} of WAL, {found.analytics_bytes:,.0f} stored",
        ),
    ]
    return Sheet("One event", ("part", "CPU µs", "bytes"), rows)


def blocks(results: Results) -> dict[str, str]:
    """Return the texts of the document's blocks, by their names."""
    found = weights(results)
    machine = results.machine
    largest = RATES[-1]
    each = limits(found)["analysts' database"]
    return {
        "machine": f"{machine['cpus']} CPUs ({machine['cpu']}), {machine['postgres']}, "
        f"{machine['kafka']}. {report.measured(results, SECTIONS)}.",
        "distances": f"{report.as_markdown(report.distances(results.figures))}\n\n{CHART}",
        "split": report.as_markdown(report.divided(results.figures)),
        "inputs": report.as_markdown(inputs(found)),
        "capacity": report.as_markdown(capacity(found)),
        "edges": report.as_markdown(edges(found)),
        "analysts": f"At {largest:,} events/s they write "
        f"{_bytes(largest * found.analytics_wal_bytes)} of WAL a second and grow by "
        f"{_bytes(largest * found.analytics_bytes * DAY_S)} a day; one Postgres within "
        f"{UTILISATION:.0%} takes {each.per_s:,.0f} events/s, bound by {each.by}.",
    }


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1_000:
            return f"{size:,.1f} {unit}"
        size /= 1_000
    return f"{size:,.1f} PB"


@click.command()
@click.argument(
    "result", default=PUBLISHED, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def main(result: Path) -> None:
    """Write the figures of RESULT, the published ones by default, into docs/scale.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, told in blocks(load(result)).items():
        text = with_figures(text, name, told)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
