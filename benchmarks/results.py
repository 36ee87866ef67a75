"""The figures of a run, saved after each of them: what breaks later costs nothing of it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import KafkaException

from devstack.processes import DevstackError
from devstack.state import REPOSITORY

# What a contender may fail with; the run goes on without its figure.
FAILURES = (DevstackError, TimeoutError, RuntimeError, psycopg.Error, KafkaException)
WRONG = ("lost", "doubled", "reordered", "stale", "sold_twice")

# What tells the runs apart whose sections are published together.
ORIGIN = ("date", "size", "commit")

Figure = dict[str, Any]


@dataclass
class Results:
    """What a run was and what it gave.

    `origins` tells of each section of a combined one when, at what size and at which commit it was
    measured.
    """

    path: Path
    machine: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def add(self, figure: Figure) -> None:
        """Take a figure and save everything."""
        self.figures.append(figure)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        unfinished.rename(self.path)

    def attempt(self, labels: Figure, take: Callable[[], Figure]) -> None:
        """Take a figure under these labels; a failure is one too."""
        with self.tolerating(labels):
            self.add(labels | take())

    @contextmanager
    def tolerating(self, labels: Figure) -> Iterator[None]:
        """Turn what a contender fails with in the block into a figure under these labels."""
        try:
            yield
        except FAILURES as error:
            self.add(labels | {"error": _line(error)})

    def content(self) -> dict[str, Any]:
        """Return what is saved."""
        return {
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "events": dict(self.sizes),
            "figures": self.figures,
        }

    def faults(self) -> list[str]:
        """Name what makes the run a failed one: a contender that failed, or a wrong event."""
        return [
            f"{_name(figure)}: {figure.get('error') or wrong(figure)}"
            for figure in self.figures
            if figure.get("error") or wrong(figure)
        ]


def load(path: Path) -> Results:
    """Read a saved run."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Results(
        path,
        found["machine"],
        found["settings"],
        found["events"],
        found["figures"],
        found.get("origins", {}),
    )


def combined(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return saved runs as one: the first, with the sections that later ones have measured.

    Each section is of one run, whole, and `origins` tells of which.
    """
    machines = [run["machine"] for run in runs if "machine" in run]
    if any(found != machines[0] for found in machines):
        raise ValueError("these runs are of different machines or versions: one page tells of one")
    sections: dict[str, list[Figure]] = {}
    origins: dict[str, Mapping[str, str]] = {}
    for run in runs:
        own: dict[str, list[Figure]] = {}
        for figure in run["figures"]:
            own.setdefault(figure["section"], []).append(figure)
        sections |= own
        told = {name: str(run["settings"].get(name, "not noted")) for name in ORIGIN}
        origins |= {section: run.get("origins", {}).get(section, told) for section in own}
    figures = [figure for found in sections.values() for figure in found]
    return {**runs[0], "figures": figures, "origins": origins}


def _name(figure: Figure) -> str:
    labels = ("section", "rows", "rate", "contender")
    return " ".join(str(figure[label]) for label in labels if label in figure)


def find(figures: Sequence[Figure], **labels: object) -> Figure | None:
    """Return the figure with these labels; None when there is none, or it is a failure."""
    for figure in figures:
        if not figure.get("error") and all(figure.get(k) == v for k, v in labels.items()):
            return figure
    return None


def wrong(figure: Figure) -> str:
    """Name what is wrong with the events of a figure; empty when all is right.

    Where it says what was `promised`, the rest may be.
    """
    promised = figure.get("promised", WRONG)
    return ", ".join(f"{figure[name]} {name}" for name in promised if figure.get(name))


def _line(error: Exception) -> str:
    """Return what went wrong in one line that tells nothing of the machine."""
    lines = str(error).strip().splitlines() or [""]
    shown = " / ".join(line.strip() for line in (lines[0], lines[-1]) if line)
    return f"{type(error).__name__}: {shown}".replace(str(REPOSITORY), "…")[:400]
