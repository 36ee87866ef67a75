"""`python -m chaos.publish [OUTCOME…]`: put runs into docs/chaos.md, with their data and charts.

Without arguments: what `make chaos` and `make chaos-mutants` have left here last, of all seeds.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.publish import with_figures
from chaos.mutation import verdicts_file
from chaos.strikes import KINDS
from devstack.processes import ConfigurationError
from devstack.state import REPOSITORY, home

DOCUMENT = REPOSITORY / "docs" / "chaos.md"
README = REPOSITORY / "README.md"
CHARTS = REPOSITORY / "docs" / "charts"
RESULTS = Path(__file__).with_name("results")
DRAWN = ("faults", "flow")
# A fault in vain struck only in part: it proves less, and is counted.
COUNTED = {
    "answers": "answers",
    "calls repeated": "calls repeated",
    "reservations told": "201s told",
    "events in the outbox": "events",
    "records delivered again on purpose": "delivered again",
    "poisoned records": "poisoned",
}

Run = Mapping[str, Any]


@click.command()
@click.argument("outcomes", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(outcomes: tuple[Path, ...]) -> None:
    """Keep OUTCOMES (files outcome.json) as the published ones and write docs/chaos.md's tables."""
    found = outcomes or sorted((home() / "chaos").glob("whole-*/outcome.json"))
    if not found or not verdicts_file().exists():
        raise ConfigurationError("nothing to publish: run `make chaos` and `make chaos-mutants`")
    RESULTS.mkdir(exist_ok=True)
    runs = [json.loads(path.read_text("utf-8")) for path in found]
    for run in runs:
        text = json.dumps(run, indent=1) + "\n"
        (RESULTS / f"{run['delivery']}-{run['seed']}.json").write_text(text, encoding="utf-8")
    for chart in DRAWN:
        shutil.copy(found[0].with_name(f"{chart}.svg"), CHARTS / f"chaos-{chart}.svg")
    shutil.copy(verdicts_file(), RESULTS / "mutants.json")
    verdicts = json.loads(verdicts_file().read_text("utf-8"))
    document = DOCUMENT.read_text("utf-8")
    for name, lines in (
        ("runs", runs_table(runs)),
        ("recovery", recovery_table(runs)),
        ("mutants", mutants_table(verdicts)),
    ):
        document = with_figures(document, name, "\n".join(lines))
    DOCUMENT.write_text(document, encoding="utf-8")
    readme = with_figures(README.read_text("utf-8"), "chaos", summary(runs, verdicts))
    README.write_text(readme, encoding="utf-8")


def summary(runs: Sequence[Run], verdicts: Iterable[Mapping[str, Any]]) -> str:
    """Return all runs in a sentence or two."""
    struck = [one for run in runs for one in run["struck"]]
    told, events = (
        sum(run["figures"][name] for run in runs)
        for name in ("reservations told", "events in the outbox")
    )
    differences = sum(one["count"] for run in runs for one in run["differences"])
    mutants = [one for one in verdicts if one["name"] != "none"]
    found = sum(one["right"] for one in mutants)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    minutes = sum(run["seconds"] for run in runs) / 60
    return (
        f"Seeds {seeds}, {minutes:.0f} minutes in all: {len(struck)} faults of "
        f"{len({one['kind'] for one in struck})} kinds, {told:,} bookings told to clients, "
        f"{events:,} events; lost, doubled, reordered, oversold: **{differences}**. "
        f"Of {len(mutants)} deliberate bugs the same audit finds {found}."
    )


def runs_table(runs: Sequence[Run]) -> list[str]:
    """Return a line for each run: what it broke, how much there was, what differed."""
    rows = []
    for run in runs:
        struck = run["struck"]
        vain = sum(bool(one["in_vain"]) for one in struck)
        kinds = len({one["kind"] for one in struck})
        rows.append(
            [
                f"{run['seed']}, {run['delivery']}, {run['seconds']:g} s",
                f"{run.get('date', '-')}, {run.get('commit', '-')}",
                f"{len(struck)}, {vain} in vain",
                f"{kinds} of {len(KINDS)}",
                *(f"{run['figures'][name]:,}" for name in COUNTED),
                f"{run['healed_s']:g}",
                f"**{sum(one['count'] for one in run['differences'])}**",
            ]
        )
    heads = (
        "seed",
        "at commit",
        "faults",
        "kinds",
        *COUNTED.values(),
        "well again after s",
        "differences",
    )
    return table(heads, rows)


def recovery_table(runs: Iterable[Run]) -> list[str]:
    """Return, for each kind of fault, seconds until each part did its work again."""
    took: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    times: dict[str, int] = defaultdict(int)
    for one in (one for run in runs for one in run["struck"]):
        times[one["kind"]] += 1
        for part, seconds in one["recovered_s"].items():
            took[one["kind"]][part.partition("-")[0]].append(seconds)
    parts = ("service", "relay", "workers")
    rows = [
        [kind, str(times[kind]), *(_spread(took[kind][part]) for part in parts)]
        for kind in sorted(times)
    ]
    return table(("fault", "times", *(f"{part}, s" for part in parts)), rows)


def _spread(seconds: Sequence[float | None]) -> str:
    """Return the median and the worst; a part that never came back is said to be so."""
    known = [one for one in seconds if one is not None]
    if len(known) < len(seconds):
        return f"never ({len(seconds) - len(known)} times)"
    return f"{median(known):.1f}, worst {max(known):.1f}" if known else "-"


def mutants_table(verdicts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each deliberate bug: what found it, and how soon."""
    rows = [[one["name"], one["fault"], one["said"], f"{one['seconds']:.0f}"] for one in verdicts]
    return table(("bug", "fault", "differences found", "s"), rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table as lines of Markdown."""
    return [f"| {' | '.join(line)} |" for line in (heads, ["-"] * len(heads), *rows)]


if __name__ == "__main__":
    main()
