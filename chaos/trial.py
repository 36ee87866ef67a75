"""`python -m chaos.trial`: a small product, a few faults one after the other, the audit as JSON.

One broker and no small disks, so that it is over in less than a minute. It tries the tree that it
is started in.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click

from chaos import whole
from chaos.product import Size
from chaos.schedule import script
from chaos.strikes import KINDS
from devstack.__main__ import INTERRUPTED, ending_well
from devstack.steps import Steps

SMALL = Size(brokers=1, services=2, relays=2, workers=2, small_disks=False)
LOAD = whole.Load(threads=8, rate=40)
FIRST_S, PAUSE_S, AFTER_S = 2.0, 1.5, 1.0
HEAL_TIMEOUT_S = 30.0
# A batch has few events here: more of them are more seams to strike at.
ENVIRONMENT = {"DATA_PLATFORM_BATCH_ROWS": "20", "RESERVATION_HOLD_SECONDS": "3"}


def trial(
    faults: list[tuple[str, float]],
    steps: Steps,
    *,
    delivery: str,
    relays: int = SMALL.relays,
    seed: int = 1,
    logs: Path | None = None,
) -> whole.Outcome:
    """Strike a small product with these faults for so many seconds each, and audit.

    Nothing may be doubled, not even under `at_least_once`: choose faults that end no relay.
    """
    planned = script(faults, first_s=FIRST_S, pause_s=PAUSE_S)
    return whole.run(
        planned,
        seconds=planned[-1].ends_s + AFTER_S,
        seed=seed,
        size=replace(SMALL, relays=relays),
        load=LOAD,
        steps=steps,
        delivery=delivery,
        environment=ENVIRONMENT,
        heal_timeout_s=HEAL_TIMEOUT_S,
        keep_logs=lambda product: whole.keep(product.logs(), logs),
    )


@click.command()
@click.argument("faults", nargs=-1, required=True)
@click.option("--delivery", default="exactly_once", show_default=True)
@click.option("--relays", type=click.IntRange(1), default=SMALL.relays, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--report", type=click.Path(path_type=Path), help="a file for the JSON")
@click.option("--logs", type=click.Path(path_type=Path), help="a folder for the parts' logs")
def main(
    *,
    faults: tuple[str, ...],
    delivery: str,
    relays: int,
    seed: int,
    report: Path | None,
    logs: Path | None,
) -> None:
    """Strike with these FAULTS, each like `relay killed=4` (seconds)."""
    wanted = [_fault(text) for text in faults]
    with ending_well(INTERRUPTED), Steps() as steps:
        outcome = trial(wanted, steps, delivery=delivery, relays=relays, seed=seed, logs=logs)
    text = json.dumps({**asdict(outcome), "good": outcome.good}, indent=1)
    if report is None:
        click.echo(text)
    else:
        report.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if outcome.good else 1)


def _fault(text: str) -> tuple[str, float]:
    name, _, seconds = text.rpartition("=")
    if name not in KINDS:
        raise click.UsageError(f"no such fault: {text}; there are {', '.join(sorted(KINDS))}")
    return name, float(seconds)


if __name__ == "__main__":
    main()
