"""`python -m chaos.mutation`: does the audit find bugs? Ten deliberate ones, each by its fault.

Each patch of chaos/mutants is applied to a copy of the tree, in which a small product is then
struck by one fault. The tree as it is must pass the same faults.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from chaos import report
from devstack.__main__ import INTERRUPTED, ending_well
from devstack.processes import Process
from devstack.state import REPOSITORY, home

PATCHES = Path(__file__).with_name("mutants")
FOUND_WITHIN_S = 120.0
# The tree as it is goes through all faults in one run.
TREE_TIMEOUT_S = 300.0
GIT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Mutant:
    """A bug: the name of its patch, the fault that brings it to light, and as what."""

    name: str
    fault: str
    finds: str
    seconds: float = 8
    delivery: str = "exactly_once"
    relays: int = 2
    # The relay sees that it is ahead of what the database has, and refuses to go on.
    stops: bool = False

    @property
    def patch(self) -> Path:
        """Its patch."""
        return PATCHES / f"{self.name}.patch"


LOST, UNLOADED = "lost: committed and not in the topic", "an event that isn't in the facts"
NO_EVENT = "a change without its event in the outbox"
UNTOLD = "a reservation of which no client was told"
# What a program has that doesn't work at all, whatever else is missing behind it.
BROKEN = ("it never comes to this", "a program that", "a fault that chaos can't strike")
MUTANTS = (
    Mutant("cursor-on-id", "rows committed late", LOST),
    Mutant("acknowledge-before-produce", "leading relay killed often", LOST, 20),
    Mutant("offsets-outside-the-transaction", "analytics: tables locked", UNLOADED, 5),
    Mutant(
        "no-version-guard",
        "records delivered again",
        "a reservation's state that isn't its last event's",
    ),
    # Under exactly_once Kafka's client refuses to start with such a producer. One relay alone never
    # gives way to another one: then at_least_once has no reason to double anything either.
    Mutant(
        "producer-without-idempotence",
        "network flickers between relays and Kafka",
        "doubled in the topic",
        12,
        "at_least_once",
        relays=1,
    ),
    Mutant(
        "cursor-before-the-flush",
        "reservations: Postgres killed amid transactions taken back",
        LOST,
        10,
        stops=True,
    ),
    Mutant("sweeper-forgets-the-event", "sweeper killed", NO_EVENT, 4),
    Mutant("swallowed-exception", "analytics: tables locked", UNLOADED, 5),
    Mutant("retry-without-its-key", "network flickers between clients and services", UNTOLD),
    Mutant("partitioner-changed", "relays upgraded", "in another partition than the key's"),
)


@dataclass(frozen=True)
class Verdict:
    """What became of a trial: kinds of differences with counts; `failure` when there was none."""

    seconds: float
    differences: Sequence[tuple[str, int]] = ()
    failure: str = ""

    @property
    def said(self) -> str:
        """It in words."""
        return self.failure or "; ".join(f"{kind} ({count})" for kind, count in self.differences)

    def finds(self, mutant: Mutant) -> bool:
        """Whether the bug was found as what it is, in programs that work otherwise."""
        kinds = {found for found, _ in self.differences}
        works = mutant.stops or not any(found.startswith(BROKEN) for found in kinds)
        return mutant.finds in kinds and works


@click.command()
@click.option("--only", type=click.Choice([mutant.name for mutant in MUTANTS]), help="one of them")
def main(only: str | None) -> None:
    """Try the tree as it is, then each mutant; exit 1 when the audit is wrong about one."""
    mutants = [mutant for mutant in MUTANTS if only in {None, mutant.name}]
    console = Console(stderr=True)
    table = Table(title="what the audit finds")
    for column in ("bug", "fault", "found", "s"):
        table.add_column(column, justify="right" if column == "s" else "left")
    good = True
    verdicts = []
    with ending_well(INTERRUPTED), snapshot() as tree:
        for delivery in dict.fromkeys(mutant.delivery for mutant in mutants):
            alike = [mutant for mutant in mutants if mutant.delivery == delivery]
            verdict = tried(tree, None, alike, TREE_TIMEOUT_S)
            fine = not verdict.said
            said = f"the tree as it is, {delivery}: {verdict.said or 'nothing'}"
            console.print(f"{said} ({verdict.seconds:.0f} s)", highlight=False)
            good &= fine
            row = ("none", f"all of these, {delivery}", verdict.said or "nothing, rightly")
            table.add_row(*row, f"{verdict.seconds:.0f}", style="green" if fine else "red")
            verdicts.append((*row, verdict.seconds, fine))
        for mutant in mutants:
            verdict = searched(tree, mutant)
            fine = verdict.finds(mutant)
            good &= fine
            found = verdict.said or "nothing"
            console.print(f"{mutant.name}: {found} ({verdict.seconds:.0f} s)", highlight=False)
            row = (mutant.name, mutant.fault, found)
            table.add_row(*row, f"{verdict.seconds:.0f}", style="green" if fine else "red")
            verdicts.append((*row, verdict.seconds, fine))
    report.console().print(table)
    # The tree as it is has passed all faults only where all were tried.
    _keep([verdict for verdict in verdicts if only is None or verdict[0] == only])
    sys.exit(0 if good else 1)


def _keep(verdicts: Sequence[tuple[str, str, str, float, bool]]) -> None:
    """Keep the last verdict of each: what `--only` doesn't try keeps the one it has."""
    file = verdicts_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text("utf-8")) if file.exists() else []
    told = {(one["name"], one["fault"]): one for one in known}
    for verdict in verdicts:
        names = ("name", "fault", "said", "seconds", "right")
        one: dict[str, Any] = dict(zip(names, verdict, strict=True))
        told[one["name"], one["fault"]] = one
    # A bug that is struck otherwise by now, or is none any more, must not keep its old verdict.
    ours = {(mutant.name, mutant.fault) for mutant in MUTANTS}
    told = {name: one for name, one in told.items() if name in ours or name[0] == "none"}
    text = json.dumps(list(told.values()), indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def verdicts_file() -> Path:
    """Return where the verdicts of the last run are."""
    return home() / "chaos" / "mutants.json"


def searched(tree: Path, mutant: Mutant) -> Verdict:
    """Strike a mutant until it is found, or until another trial would be over too late.

    Some bugs show only when a fault hits the milliseconds that they leave open.
    """
    spent_s, longest_s, seed = 0.0, 0.0, 1
    while True:
        verdict = tried(tree, mutant.patch, [mutant], FOUND_WITHIN_S - spent_s, seed)
        spent_s, longest_s = spent_s + verdict.seconds, max(longest_s, verdict.seconds)
        if verdict.finds(mutant) or spent_s + longest_s > FOUND_WITHIN_S:
            return replace(verdict, seconds=spent_s)
        seed += 1


def tried(
    tree: Path, patch: Path | None, mutants: Sequence[Mutant], timeout_s: float, seed: int = 1
) -> Verdict:
    """Strike a copy of a tree, patched or as it is, with these mutants' faults."""
    with tempfile.TemporaryDirectory(prefix="chaos-mutant-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(tree, copy)
        if patch is not None:
            apply(patch, copy)
        return _tried(copy, mutants, timeout_s, seed)


def _tried(tree: Path, mutants: Sequence[Mutant], timeout_s: float, seed: int) -> Verdict:
    said, log = tree / "trial.json", tree / "trial.log"
    began_s = time.monotonic()
    trial = Process(
        [
            *(sys.executable, "-m", "chaos.trial", "--report", said),
            *("--delivery", mutants[0].delivery, "--relays", str(mutants[0].relays)),
            *("--seed", str(seed)),
            *dict.fromkeys(f"{mutant.fault}={mutant.seconds:g}" for mutant in mutants),
        ],
        name="trial",
        log=log,
        # Not make's child, who would take our leash for a make that has ended.
        env={name: value for name, value in os.environ.items() if name != "MAKELEVEL"}
        | {"DEVSTACK_HOME": str(home())},
        cwd=tree,
    )
    try:
        trial.wait(timeout_s)
    except TimeoutError:
        return Verdict(time.monotonic() - began_s, failure=f"no verdict in {timeout_s:g} s")
    finally:
        trial.stop()
    seconds = time.monotonic() - began_s
    if not said.exists():
        return Verdict(seconds, failure=f"no verdict: {trial.log_tail()}")
    found: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
    vain = [f"{one['kind']}: {one['in_vain']}" for one in found["struck"] if one["in_vain"]]
    if vain or len(found["struck"]) < len({mutant.fault for mutant in mutants}):
        return Verdict(seconds, failure=f"not struck: {'; '.join(vain) or found['skipped']}")
    return Verdict(seconds, [(one["kind"], one["count"]) for one in found["differences"]])


@contextmanager
def snapshot() -> Iterator[Path]:
    """Yield a copy of the tree as it lies here, without what git ignores.

    All trials are of this one, whatever is edited meanwhile.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        timeout=GIT_TIMEOUT_S,
    )
    with tempfile.TemporaryDirectory(prefix="chaos-tree-") as folder:
        for name in filter(None, listed.stdout.split("\0")):
            source, copy = REPOSITORY / name, Path(folder) / name
            if source.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, copy)
        yield Path(folder)


def apply(patch: Path, tree: Path, *options: str) -> None:
    """Apply a patch to a copy of the tree.

    Raises:
        subprocess.CalledProcessError: it doesn't fit any more.
    """
    subprocess.run(  # noqa: S603 - our own patches
        ["git", "apply", *options, str(patch)],  # noqa: S607
        cwd=tree,
        # Else git would look for a repository around it, and pass over what it doesn't know.
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)},
        check=True,
        capture_output=True,
        text=True,
        timeout=GIT_TIMEOUT_S,
    )


if __name__ == "__main__":
    main()
