"""What a run has to reach, and whether it did: ratios within the run, and a few limits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.latency import RATES
from benchmarks.results import Figure, find
from benchmarks.surroundings import DELIVERIES

TIMES_DEBEZIUM = {"at_least_once": 3.0, "exactly_once": 2.5}
SHARE_OF_THE_LIMIT = 0.7
EXACTLY_ONCE_LIMITS_MS = {"p50_ms": 8.0, "p99_ms": 30.0}
WRITERS_SHARE = 0.9
IDLE_CPU_PERCENT = 1.0
ROW_AFTER_QUIET_MS = 30.0
PEAK_MEMORY_MB = 150.0
TIMES = "times"
MB_PER_MIB = 2**20 / 1e6


@dataclass(frozen=True)
class Goal:
    """One line of what must be reached; `found` is None when this run doesn't tell."""

    what: str
    unit: str
    wanted: float
    found: float | None
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether it is; None when this run doesn't tell."""
        if self.found is None:
            return None
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def goals(figures: Sequence[Figure]) -> list[Goal]:
    """Return every line, in the order in which they were asked for."""
    return [*_drain(figures), *_latency(figures), *_beside(figures)]


def _drain(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Ratios at the largest backlog that everyone has drained."""
    for delivery in DELIVERIES:
        for others, wanted in (
            (("debezium",), TIMES_DEBEZIUM[delivery]),
            (("raw-read", "raw-produce"), SHARE_OF_THE_LIMIT),
        ):
            rows, found = _ratio(figures, delivery, others)
            at = f" at {rows:,} rows" if rows else ""
            what = f"drain {delivery} against {'the slower of ' * (len(others) > 1)}"
            yield Goal(f"{what}{', '.join(others)}{at}", TIMES, wanted, found)


def _ratio(
    figures: Sequence[Figure], ours: str, others: tuple[str, ...]
) -> tuple[int, float | None]:
    """Return the largest common backlog and our speed there against the slowest of the others."""
    sizes = {figure["rows"] for figure in figures if figure["section"] == "drain"}
    for rows in sorted(sizes, reverse=True):
        labels = {"section": "drain", "rows": rows, "open_transaction": False}
        speeds = [
            found["events_per_s"] if found else None
            for found in (find(figures, contender=name, **labels) for name in (ours, *others))
        ]
        known = [speed for speed in speeds if speed is not None]
        if len(known) == len(speeds):
            return rows, round(known[0] / min(known[1:]), 2)
    return 0, None


def _latency(figures: Sequence[Figure]) -> Iterator[Goal]:
    for rate in RATES:
        ours = find(figures, section="latency", rate=rate, contender="at_least_once")
        theirs = find(figures, section="latency", rate=rate, contender="debezium")
        for quantile in EXACTLY_ONCE_LIMITS_MS:
            found = round(ours[quantile] / theirs[quantile], 2) if ours and theirs else None
            yield Goal(
                f"latency at_least_once {quantile[:3]} against debezium at {rate:,}/s",
                TIMES,
                1.0,
                found,
                at_most=True,
            )
    for rate in RATES:
        exactly = find(figures, section="latency", rate=rate, contender="exactly_once")
        for quantile, limit in EXACTLY_ONCE_LIMITS_MS.items():
            found = exactly[quantile] if exactly else None
            what = f"latency exactly_once {quantile[:3]} at {rate:,}/s"
            yield Goal(what, "ms", limit, found, at_most=True)


def _beside(figures: Sequence[Figure]) -> Iterator[Goal]:
    for delivery in DELIVERIES:
        writers = find(figures, section="writers", contender=delivery)
        found = writers["ratio"] if writers else None
        yield Goal(f"writers beside {delivery}, against without", TIMES, WRITERS_SHARE, found)
        idle = find(figures, section="idle", contender=delivery)
        found = idle["cpu_percent"] if idle else None
        yield Goal(f"idle CPU of {delivery}", "%", IDLE_CPU_PERCENT, found, at_most=True)
        found = idle["first_row_ms"] if idle else None
        what = f"row after a quiet time, {delivery}"
        yield Goal(what, "ms", ROW_AFTER_QUIET_MS, found, at_most=True)
        peaks = [
            figure["peak_mib"] * MB_PER_MIB
            for figure in figures
            if figure["section"] == "drain" and figure["contender"] == delivery
            if figure.get("peak_mib")
        ]
        found = round(max(peaks), 1) if peaks else None
        yield Goal(f"peak memory of {delivery}", "MB", PEAK_MEMORY_MB, found, at_most=True)
