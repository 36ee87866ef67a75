"""`python -m docs.model`: search both models through, and show how the wrong ways break.

Exit code 1 where ours breaks, or a wrong way holds or breaks another promise than it says here.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from docs.model.loader import Offsets, Partition
from docs.model.relay import Bounds, ById, ByTransaction, Outbox, SnapshotDifference
from docs.model.search import Model, Outcome, explore


@dataclass(frozen=True)
class Case:
    """A model, and the promise that it has to break; None: it has to hold."""

    name: str
    model: Model[Any]
    breaks: str | None = None


# Three transactions, two of them of one key; two relays. A chunk has one event, so that two waiting
# ones are a big batch already.
SHORT = Bounds(keys=("a", "a", "b"), sessions=2, crashes=1)
FULL = Bounds(keys=("a", "a", "bb"), sessions=2, crashes=1)


def cases(*, full: bool) -> Sequence[Case]:
    """Return all that `make model` searches."""
    ours = Outbox(SnapshotDifference(), FULL if full else SHORT)
    # What breaks without a crash is shown without one: a shorter search for the same way.
    calm = replace(ours, bounds=replace(SHORT, crashes=0))
    loader = Partition(records=5 if full else 3, starts=4 if full else 3)
    return [
        Case("relay: snapshot difference, fencing (ours)", ours),
        Case("relay: a cursor on id", replace(calm, reader=ById()), "lost"),
        Case(
            "relay: a cursor on (xid, id)",
            replace(calm, reader=ByTransaction(below_horizon=False)),
            "lost",
        ),
        Case(
            "relay: a cursor on (xid, id), below the xmin horizon",
            replace(calm, reader=ByTransaction(below_horizon=True)),
            "reordered",
        ),
        Case(
            "relay: a batch's first id from the sequence",
            replace(calm, reader=SnapshotDifference(first_id_from_sequence=True)),
            "lost",
        ),
        Case(
            "relay: WAL not flushed before a batch leaves",
            replace(ours, reader=SnapshotDifference(flushes_wal=False)),
            "lost",
        ),
        Case("relay: an older relay not fenced", replace(calm, fencing=False), "doubled"),
        Case(
            "writers: INSERT before the key's lock", replace(calm, locks_first=False), "reordered"
        ),
        Case(f"loader: {Offsets.LOCKED_AND_COMPARED.value}", loader),
        *(
            Case(f"loader: {offsets.value}", replace(loader, offsets=offsets), breaks)
            for offsets, breaks in WRONG_OFFSETS.items()
        ),
        Case(
            "loader: not compared; a worker that lost its partition does no more than go on",
            replace(loader, offsets=Offsets.NOT_COMPARED, in_turn=True),
            "doubled",
        ),
    ]


WRONG_OFFSETS = {
    Offsets.NOT_COMPARED: "lost",
    Offsets.NOT_LOCKED: "doubled",
    Offsets.AFTERWARDS: "doubled",
    Offsets.BEFOREHAND: "lost",
}


def as_expected(case: Case, outcome: Outcome) -> bool:
    """Whether a model holds, or breaks, as its case says."""
    kind = outcome.broken and outcome.broken.partition(":")[0]
    # A relay that publishes nothing, a worker that loads nothing would break nothing either.
    return kind == case.breaks and (case.breaks is not None or outcome.done > 0)


@click.command()
@click.option("--short", is_flag=True, help="Fewer transactions and restarts: a few seconds.")
def main(*, short: bool) -> None:
    """Search every state; print a shortest way to what is broken."""
    failed = False
    for case in cases(full=not short):
        outcome = explore(case.model)
        good = as_expected(case, outcome)
        failed = failed or not good
        click.echo(f"\n{'' if good else 'NOT AS EXPECTED: '}{case.name}")
        found = f"breaks: {outcome.broken}" if outcome.broken else "holds"
        click.echo(f"  {found} ({outcome.states:,} states, {outcome.cpu_s:.1f} s of CPU)")
        for number, words in enumerate(outcome.trace, 1):
            click.echo(f"  {number:3}. {words}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
