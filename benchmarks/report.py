"""A run's figures as tables: on a terminal, or as the Markdown that the documents show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import loader
from benchmarks.goals import goals
from benchmarks.latency import QUANTILES
from benchmarks.results import Figure, Results, wrong

FAILED = "failed"
YES_NO = {True: "yes", False: "no", None: "not measured"}


@dataclass(frozen=True)
class Sheet:
    """A table: a title, headings, and rows of texts."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def sheets(results: Results) -> list[Sheet]:
    """Return the tables of a run; empty ones are left out."""
    figures = results.figures
    found = [_drain(figures), _latency(figures), _idle(figures), _writers(figures)]
    found += [_loader(figures), _visible(figures), _analysts(figures), _migration(figures)]
    return [sheet for sheet in [*found, _goals(figures)] if sheet.rows]


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    for sheet in sheets(results):
        table = Table(title=sheet.title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, heading in enumerate(sheet.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in sheet.rows:
            table.add_row(*row, style={"no": "red", "yes": "green"}.get(row[-1], ""))
        console.print(table)
    for fault in results.faults():
        console.print(f"[red]✗[/] {fault}", highlight=False)


def markdown(results: Results) -> str:
    """Return the tables as Markdown."""
    parts = []
    for sheet in sheets(results):
        lines = [sheet.headings, ["-", *["-:"] * (len(sheet.headings) - 1)], *sheet.rows]
        parts.append(
            f"**{sheet.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
        )
    return "\n\n".join(parts)


def _drain(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "events/s": _number("events_per_s"),
        "µs/event": _number("us_per_event", 2),
        "CPU µs/event": _number("cpu_us_per_event", 2),
        "CPU s": _number("cpu_s", 2),
        "PG CPU s": _number("postgres_cpu_s", 2),
        "Kafka CPU s": _number("kafka_cpu_s", 2),
        "peak MiB": _number("peak_mib"),
        "first after s": _number("start_s", 2),
        "wrong": lambda figure: wrong(figure) or "-",
    }

    def name(figure: Figure) -> str:
        behind = " (open transaction)" if figure.get("open_transaction") else ""
        return f"{figure.get('rows', 0):,} {figure['contender']}{behind}"

    return _sheet(
        "Drain of a backlog", "rows, contender", figures, "drain", name=name, columns=columns
    )


def _latency(figures: Sequence[Figure]) -> Sheet:
    columns = {heading[:-3].replace("p999", "p99.9"): _number(heading, 2) for heading in QUANTILES}
    columns |= {"max": _number("max_ms", 2), "wrong": lambda figure: wrong(figure) or "-"}
    return _sheet(
        "From the commit to the consumer, ms",
        "rate, contender",
        figures,
        "latency",
        name=lambda figure: f"{figure.get('rate', 0):,}/s {figure['contender']}",
        columns=columns,
    )


def _idle(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "CPU %": _number("cpu_percent", 2),
        "Postgres CPU %": _number("postgres_cpu_percent", 2),
        "connections": _number("postgres_connections"),
        "first row ms": _number("first_row_ms", 1),
        "later rows p50 ms": lambda figure: f"{figure['later_rows']['p50_ms']:.1f}",
        "worst ms": lambda figure: f"{figure['later_rows']['max_ms']:.1f}",
    }
    return _sheet(
        "Nothing to do",
        "relay",
        figures,
        "idle",
        name=lambda figure: figure["contender"],
        columns=columns,
    )


def _writers(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "transactions/s": _number("transactions_per_s"),
        "ratio": _number("ratio", 3),
        "caught up after s": _number("caught_up_s", 2),
    }
    return _sheet(
        "Writers",
        "beside",
        figures,
        "writers",
        name=lambda figure: figure["contender"],
        columns=columns,
    )


def _loader(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "events/s": _number("events_per_s"),
        "µs/event": _number("us_per_event", 2),
        "CPU µs/event": _number("cpu_us_per_event", 2),
        "PG CPU µs": _number("postgres_us_per_event", 2),
        "Kafka CPU µs": _number("kafka_us_per_event", 2),
        "peak MiB": _number("peak_mib"),
        "wrong": lambda figure: wrong(figure) or "-",
    }

    def name(figure: Figure) -> str:
        return f"{figure.get('rows', 0):,} {figure['contender']}"

    return _sheet(
        "Loading a topic", "rows, contender", figures, "loader", name=name, columns=columns
    )


def _visible(figures: Sequence[Figure]) -> Sheet:
    columns = {heading[:-3].replace("p999", "p99.9"): _number(heading, 2) for heading in QUANTILES}
    return _sheet(
        "From the booking's commit to the analyst, ms",
        "rate, contender",
        figures,
        "loader latency",
        name=lambda figure: f"{figure.get('rate', 0):,}/s {figure['contender']}",
        columns=columns | {"max": _number("max_ms", 2)},
    )


def _analysts(figures: Sequence[Figure]) -> Sheet:
    asked = [f for f in figures if f["section"] == "analysts" and "limit_ms" in f]
    return Sheet(
        "Ten questions of docs/analysts.md",
        ("question", "events", "median ms", "first ms", "slowest ms", "limit ms", "reached"),
        [
            (
                figure["contender"],
                f"{figure['rows']:,}",
                *(f"{figure[name]:,.1f}" for name in ("ms", "first_ms", "slowest_ms")),
                f"{figure['limit_ms']:,.0f}",
                YES_NO[figure["ms"] <= figure["limit_ms"]],
            )
            if not figure.get("error")
            else (figure["contender"], f"{figure['rows']:,}", *["-"] * 4, FAILED)
            for figure in asked
        ],
    )


def _migration(figures: Sequence[Figure]) -> Sheet:
    return Sheet(
        "Migration beside a reader",
        ("events", "took s", "reader's longest wait ms", "questions of the reader"),
        [
            (
                f"{figure['rows']:,}",
                f"{figure['s']:,.1f}",
                f"{figure['reader_longest_ms']:,.1f}",
                f"{figure['reader_asked']:,}",
            )
            for figure in figures
            if figure["section"] == "analysts" and "reader_asked" in figure
        ],
    )


def _goals(figures: Sequence[Figure]) -> Sheet:
    rows = [
        (
            goal.what,
            f"{'≤' if goal.at_most else '≥'} {goal.wanted:g} {goal.unit}",
            "-" if goal.found is None else f"{goal.found:g} {goal.unit}",
            YES_NO[goal.reached],
        )
        for goal in [*goals(figures), *loader.goals(figures)]
    ]
    return Sheet("Must reach", ("what", "wanted", "found", "reached"), rows)


def _sheet(
    title: str,
    what: str,
    figures: Sequence[Figure],
    section: str,
    *,
    name: Callable[[Figure], str],
    columns: dict[str, Callable[[Figure], str]],
) -> Sheet:
    rows = []
    for figure in figures:
        if figure["section"] == section:
            cells = [FAILED, *[""] * (len(columns) - 1)]
            if not figure.get("error"):
                cells = [column(figure) for column in columns.values()]
            rows.append([name(figure), *cells])
    return Sheet(title, (what, *columns), rows)


def _number(field: str, decimals: int = 0) -> Callable[[Figure], str]:
    def text(figure: Figure) -> str:
        value: Any = figure.get(field)
        return "-" if value is None else f"{value:,.{decimals}f}"

    return text
