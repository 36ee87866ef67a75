"""`make compatibility`: run every cell of the matrix, write docs/compatibility.{json,md}."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from devstack.__main__ import ending_well
from devstack.processes import DevstackError
from devstack.steps import Steps
from tests.compatibility import pages
from tests.compatibility.matrix import CELLS, RESERVATIONS, problems, run_cell

RESULTS = pages.DOCS / "compatibility.json"
COLUMNS = {
    "PostgreSQL": "postgres",
    "Kafka": "kafka",
    "brokers": "brokers",
    "delivery": "delivery",
    "workers": "workers",
    "group protocol": "protocol",
    "reservations": "reservations",
    "events": "events",
    "lost": "lost",
    "doubled in tables": "doubled_in_tables",
    "doubled in topic": "doubled_in_topic",
    "reordered": "reordered",
    "seconds": "seconds",
    "result": "result",
}


@click.command()
@click.option("--reservations", type=click.IntRange(100, 5_000), default=RESERVATIONS)
@click.option("--only", type=click.IntRange(1, len(CELLS)), help="this cell alone, write nothing")
def main(reservations: int, only: int | None) -> None:
    """Run the cells one after the other; exit 1 when one isn't as it must be."""
    rows: list[dict[str, Any]] = []
    with ending_well(130), Steps() as steps:
        for cell in [CELLS[only - 1]] if only else CELLS:
            steps.console.print(f"[bold]{cell}[/]", highlight=False)
            try:
                row = run_cell(cell, steps, reservations)
                found = problems(cell, row)
            except (DevstackError, TimeoutError) as error:
                steps.console.print(str(error), highlight=False, markup=False)
                row, found = asdict(cell), [str(error).splitlines()[0]]
            rows.append({**row, "result": "; ".join(found) or "agrees"})
            steps.console.print(f"  {json.dumps(rows[-1])}", highlight=False, soft_wrap=True)
            # Each by itself: what was run before an interruption stays on the page.
            if not only:
                write(rows)
    sys.exit(1 if any(row["result"] != "agrees" for row in rows) else 0)


def write(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the results, and the table of them into the page."""
    results = {"date": datetime.now(UTC).date().isoformat(), "cells": list(rows)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    pages.write("matrix", table(results))


def table(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    run, agree = len(results["cells"]), sum(r["result"] == "agrees" for r in results["cells"])
    said = f"{results['date']}: {run} of {len(CELLS)} cells run, {agree} agree."
    return f"{said}\n\n{pages.table(COLUMNS, results['cells'])}"


if __name__ == "__main__":
    main()
