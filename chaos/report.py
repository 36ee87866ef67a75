"""What a run has shown: a table for people, JSON for programs, charts of when what was broken."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pygal
from pygal.style import Style
from rich.console import Console
from rich.table import Table

from chaos.whole import Outcome, Struck
from devstack.state import origin

FILE_WIDTH = 160
WIDTH, HEIGHT, LINE_HEIGHT = 1000, 380, 17
# A curve of ten minutes has thousands of points; a chart shows so many.
POINTS = 400
COLORS = ("#8a8f98", "#1f6feb", "#d9822b")
FAULT_COLOR = "#b3261e"


def console() -> Console:
    """Return what the tables go to; a file has room for whole names."""
    found = Console()
    if not found.is_terminal:
        found.width = FILE_WIDTH
    return found


def show(outcome: Outcome, console: Console) -> None:
    """Print what was done, what it cost, and whether every place agrees."""
    console.print(_faults(outcome))
    for kind, why in sorted(outcome.skipped.items()):
        console.print(f"skipped: {kind} ({why})", highlight=False)
    for name, count in outcome.ended_by_themselves.items():
        console.print(f"{name} ended by itself {count} times and was started again")
    table = Table(title=f"seed {outcome.seed}, {outcome.seconds:g} s, {outcome.delivery}")
    table.add_column("what")
    table.add_column("count", justify="right")
    for what, count in outcome.figures.items():
        table.add_row(what, f"{count:,}")
    table.add_row("seconds until all was well again", f"{outcome.healed_s:g}", end_section=True)
    for difference in outcome.differences:
        table.add_row(f"[red]{difference.kind}", f"[red]{difference.count:,}")
    if outcome.good:
        table.add_row("[green]differences", "[green]0")
    console.print(table)
    for difference in outcome.differences:
        for example in difference.examples:
            console.print(f"{difference.kind}: {example}", highlight=False, markup=False)


def _faults(outcome: Outcome) -> Table:
    parts = sorted({part for struck in outcome.struck for part in struck.recovered_s})
    table = Table(title="faults, and seconds behind each until a part did its work again")
    for name in ("fault", "struck", "at s", "for s", *parts):
        table.add_column(name, justify="left" if name in {"fault", "struck"} else "right")
    for struck in outcome.struck:
        took = (struck.recovered_s.get(part) for part in parts)
        table.add_row(
            struck.kind,
            f"{struck.target} [yellow]in vain: {struck.in_vain}"
            if struck.in_vain
            else struck.target,
            f"{struck.began_s:.1f}",
            f"{struck.ended_s - struck.began_s:.1f}",
            *("[red]never" if took_s is None else f"{took_s:g}" for took_s in took),
        )
    return table


def write(outcome: Outcome, folder: Path) -> None:
    """Write outcome.json, faults.svg and flow.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            **origin(),
            **asdict(outcome),
            "curves": {name: _thinned(curve) for name, curve in outcome.curves.items()},
            "good": outcome.good,
        },
        indent=1,
    )
    (folder / "outcome.json").write_text(text + "\n", encoding="utf-8")
    _timeline(outcome).render_to_file(str(folder / "faults.svg"))
    _flow(outcome).render_to_file(str(folder / "flow.svg"))


def _timeline(outcome: Outcome) -> pygal.Graph:
    """Draw a line for each kind of fault, thick where it was struck."""
    by_kind: dict[str, list[Struck]] = defaultdict(list)
    for struck in outcome.struck:
        by_kind[struck.kind].append(struck)
    kinds = sorted(by_kind, key=lambda name: by_kind[name][0].began_s, reverse=True)
    chart = pygal.XY(
        width=WIDTH,
        height=120 + LINE_HEIGHT * len(kinds),
        title=f"What was broken when, seed {outcome.seed}",
        x_title="seconds",
        style=_style(FAULT_COLOR),
        show_legend=False,
        dots_size=2,
        xrange=(0, outcome.seconds),
        range=(0, len(kinds) + 1),
        **_OFFLINE,
    )
    chart.y_labels = [{"value": line, "label": name} for line, name in enumerate(kinds, start=1)]
    points: list[tuple[float, float] | None] = []
    for line, name in enumerate(kinds, start=1):
        for struck in by_kind[name]:
            points += [(struck.began_s, line), (struck.ended_s, line), None]
    chart.add("", points, allow_interruptions=True, stroke_style={"width": 6})
    return chart


def _flow(outcome: Outcome) -> pygal.Graph:
    """Draw how many events had come how far."""
    chart = pygal.XY(
        width=WIDTH,
        height=HEIGHT,
        title="Events that were committed, in the topic, in the tables",
        x_title="seconds",
        y_title="events so far",
        style=_style(*COLORS),
        show_dots=False,
        stroke_style={"width": 2},
        **_OFFLINE,
    )
    for name, curve in outcome.curves.items():
        chart.add(name, _thinned(curve))
    return chart


def _thinned(curve: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    return list(curve[:: max(1, len(curve) // POINTS)])


def _style(*colors: str) -> Style:
    return Style(colors=colors, background="white", plot_background="white")


# Neither scripts nor fonts from elsewhere.
_OFFLINE = {"js": [], "disable_xml_declaration": True, "explicit_size": True}
