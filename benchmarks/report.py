"""A run's figures as tables: on a terminal, or as the Markdown that the documents show."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import (
    booking,
    fault_loaders,
    faults,
    growth,
    loader,
    onsale,
    outage,
    promise_group,
    promises,
    scale,
    soak,
    split,
)
from benchmarks.goals import goals
from benchmarks.latency import QUANTILES, RATES
from benchmarks.results import Figure, Results, find, wrong

FAILED = "failed"
YES_NO = {True: "yes", False: "no", None: "not measured"}


@dataclass(frozen=True)
class Sheet:
    """A table: a title, headings, and rows of texts."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def sheets(results: Results) -> list[Sheet]:
    """Return the tables of a run but for the promises'; empty ones are left out."""
    figures = results.figures
    found = [_drain(figures), _latency(figures), _idle(figures), _writers(figures)]
    found += [_loader(figures), _visible(figures), _growth(figures), _analysts(figures)]
    found += [_migration(figures), _reconcile(figures)]
    found += [_booking(figures), _plan(figures), _onsale(figures), _ways(figures), _kafka(figures)]
    found += [distances(figures), divided(figures)]
    found += [_soak(figures), _faults(figures), _loader_faults(figures)]
    return [sheet for sheet in [*found, _goals(figures)] if sheet.rows]


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    promised = (make(results.figures) for make in PROMISES.values())
    for sheet in [*sheets(results), *(sheet for sheet in promised if sheet.rows)]:
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
    return "\n\n".join(map(as_markdown, sheets(results)))


def as_markdown(sheet: Sheet) -> str:
    """Return a table as Markdown."""
    lines = [sheet.headings, ["-", *["-:"] * (len(sheet.headings) - 1)], *sheet.rows]
    return f"**{sheet.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def promise(figures: Sequence[Figure], name: str) -> str:
    """Return a promise's figures as Markdown, with its chart; nothing where there are none."""
    sheet = PROMISES[name](figures)
    chart = f"\n\n![{name}](charts/promise-{name}.svg)" if name in PROMISE_CHARTS else ""
    return as_markdown(sheet) + chart if sheet.rows else ""


def measured(results: Results, sections: Collection[str] = ()) -> str:
    """Return when, at what size and at which commit each section was measured; all by default."""
    runs: dict[str, list[str]] = {}
    for section, origin in results.origins.items():
        if not sections or section in sections:
            told = f"{origin['date']}, size {origin['size']}, commit {origin['commit']}"
            runs.setdefault(told, []).append(f"*{section}*")
    return "; ".join(f"{', '.join(names)}: {told}" for told, names in runs.items())


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

    sections = {loader.SECTION, loader.BESIDE}
    measured = [figure for figure in figures if figure["section"] in sections]
    return _sheet("Loading a topic", "rows, contender", measured, name=name, columns=columns)


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


def _growth(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "CPU µs/event": _number("cpu_us_per_event", 2),
        "PG CPU µs": _number("postgres_us_per_event", 2),
        "both": _number("all_cpu_us_per_event", 2),
        "µs/event": _number("us_per_event", 2),
        "events/s": _number("events_per_s"),
        "wrong": lambda figure: wrong(figure) or "-",
    }
    return _sheet(
        f"Loading {growth.EVENTS:,} events by what the tables hold already",
        "events there",
        figures,
        "growth",
        name=lambda figure: f"{figure.get('rows', 0):,}",
        columns=columns,
    )


def _reconcile(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "s": _number("seconds", 1),
        "events/s": _number("events_per_s"),
        "CPU s": _number("command_cpu_s", 1),
        "peak MiB": _number("peak_mib"),
        "tables locked s": _number("locked_s", 2),
        "differences": _number("differences"),
    }
    return _sheet(
        "Proving and rebuilding the tables (rebuild: two rows altered before)",
        "events, command",
        figures,
        "reconcile",
        name=lambda figure: f"{figure.get('rows', 0):,} {figure['contender']}",
        columns=columns,
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


def _booking(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "per s": _number("per_s"),
        "p50 ms": _number("p50_ms", 1),
        "p99 ms": _number("p99_ms", 1),
        "service CPU µs": _number("service_cpu_us"),
        "PG CPU µs": _number("postgres_cpu_us"),
        "customers' CPU µs": _number("load_cpu_us"),
        "failed": _number("failed"),
    }
    return _sheet("Bookings", "what", figures, "booking", name=_contender, columns=columns)


def _plan(figures: Sequence[Figure]) -> Sheet:
    names = {"plan": "whole, gzip", "plan-again": "unchanged, 304"}  # as `bookers` calls them
    columns = {
        "p50 ms": _number("p50_ms", 2),
        "p99 ms": _number("p99_ms", 2),
        "bytes": _number("body_bytes"),
        "failed": _number("failed"),
    }
    return _sheet(
        f"GET the {booking.PLAN_SEATS:,} seats of a performance",
        "answer",
        figures,
        "plan",
        name=lambda figure: names[figure["contender"]],
        columns=columns,
    )


def _onsale(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "over after s": _number("seconds", 1),
        "p50 ms": _number("p50_ms", 1),
        "p99 ms": _number("p99_ms", 1),
        "slowest ms": _number("max_ms", 1),
        "sold": _number("sold"),
        "sold twice": _number("sold_twice"),
        "5xx": _number("server_errors"),
        "unanswered": _number("unanswered"),
    }
    names = {
        "fans": f"{onsale.FANS:,} people, {onsale.SEATS:,} seats",
        "rush": f"{onsale.CLAIMS} at once, one seat",
    }
    return _sheet(
        "On-sale",
        "who",
        figures,
        "onsale",
        name=lambda figure: names[str(figure["contender"])],
        columns=columns,
    )


def _ways(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "p50 ms": _number("p50_ms", 1),
        "p99 ms": _number("p99_ms", 1),
        "customers": _number("customers"),
        "failed bookings": _number("failed"),
        "lost events": _number("lost_events"),
        "invented events": _number("invented_events"),
        "bookings/s at most": _number("most_per_s"),
    }
    return _sheet(
        f"Booking at {outage.RATE}/s while the data platform is …",
        "platform: way",
        figures,
        "ways",
        name=lambda figure: f"{figure.get('platform', '')}: {figure['contender']}",
        columns=columns,
    )


def old_and_new(figures: Sequence[Figure]) -> str:
    """Return, as Markdown for the README, what each way makes of a platform in trouble."""
    measured = [figure for figure in figures if figure["section"] == "ways"]
    names = {
        outage.OURS: "outbox",
        outage.INSIDE: "call, then commit",
        outage.AFTER: "commit, then call",
    }
    lines = [["data platform", *names.values()], ["-"] * (len(names) + 1)]
    for state in outage.STATES:
        found = [find(measured, contender=name, platform=state) for name in names]
        lines.append([state, *(_told(figure) if figure else "-" for figure in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _told(figure: Figure) -> str:
    """Say what customers wait for, and what goes wrong for how many of them."""
    wrongs = {
        "bookings fail": figure["failed"],
        "events lost": figure["lost_events"],
        "events of no booking": figure["invented_events"],
    }
    told = [f"**{count:,} {what}**" for what, count in wrongs.items() if count]
    return ", ".join([f"p99 {figure['p99_ms']:,.0f} ms", *told])


def _kafka(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "p50 ms": _number("p50_ms", 2),
        "p99 ms": _number("p99_ms", 2),
        "p99 ratio": _number("p99_ratio", 3),
        "customers": _number("customers"),
        "failed": _number("failed"),
        "lost": _number("lost"),
    }
    return _sheet(
        f"Booking at {outage.KAFKA_RATE}/s while Kafka is …",
        "Kafka",
        figures,
        "kafka",
        name=_contender,
        columns=columns,
    )


def _soak(figures: Sequence[Figure]) -> Sheet:
    slices = [figure for figure in figures if figure["section"] == "soak"]
    booked = sum(figure["booked"] for figure in slices)
    minutes = slices[-1]["at_s"] / 60 if slices else 0
    medians = soak.quarters(slices) if len(slices) >= soak.LEAST_SLICES else {}
    told = find(figures, section="soak verdict")
    verdict = "; ".join(told["problems"]) or "flat" if told else "not judged"
    title = f"Soak: {booked:,} bookings in {minutes:.0f} minutes; medians of a minute: {verdict}"
    rows = [(what, f"{warm:,.1f}", f"{last:,.1f}") for what, (warm, last) in medians.items()]
    return Sheet(title, ("what", "second quarter", "last quarter"), rows)


def _faults(figures: Sequence[Figure]) -> Sheet:
    def late(fault: str) -> Callable[[Figure], str]:
        return lambda figure: f"{figure['late_s'][fault]:,.1f}"

    columns = {
        "events": _number("events"),
        "lost": _number("lost"),
        "doubled": _number("doubled"),
        "reordered": _number("reordered"),
        "invented": _number("invented"),
        "restarted": _number("restarted"),
        **{fault.name: late(fault.name) for fault in faults.SCRIPT},
    }
    title = "Faults while publishing; around each, the latest event's seconds to a consumer"
    return _sheet(title, "publisher", figures, "faults", name=_contender, columns=columns)


def _loader_faults(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "events": _number("events"),
        "lost": _number("lost"),
        "stale": _number("stale"),
        "doubled": _number("doubled"),
        "restarted": _number("restarted"),
        "stood still s": _number("standstill_s", 1),
        "caught up after s": _number("caught_up_s", 1),
    }
    title = "Faults while loading what an at-least-once publisher leaves"
    return _sheet(title, "loader", figures, "loader faults", name=_contender, columns=columns)


@dataclass(frozen=True)
class Compared:
    """A column of figures of which the best are to be seen."""

    heading: str
    section: str
    field: str
    decimals: int = 0
    more_is_better: bool = False
    value: Callable[[Figure, str], float | None] = Figure.get


def _everybody_us(figure: Figure, own: str) -> float | None:
    """Return the CPU of an event in a process, Postgres and Kafka; None where one is not known."""
    servers = [figure.get(f"{server}_us_per_event") for server in ("postgres", "kafka")]
    if figure["section"] == "drain":
        spent_s = [figure.get(f"{server}_cpu_s") for server in ("postgres", "kafka")]
        servers = [s if s is None else s * 1e6 / figure["rows"] for s in spent_s]
    parts = [figure.get(own), *servers]
    return None if None in parts else sum(part for part in parts if part)


PUBLISHERS = {
    "exactly_once": "**ours**, exactly once",
    "at_least_once": "**ours**, at least once",
    "debezium": "Debezium",
    faults.DEBEZIUM_ONCE: "Debezium in distributed Connect, exactly once",
    "polling": "`SKIP LOCKED` relay (two under faults)",
}
PUBLISHING = (
    Compared("backlog, events/s", "drain", "events_per_s", more_is_better=True),
    Compared("p50 ms", "latency", "p50_ms", 1),
    Compared("p99 ms", "latency", "p99_ms", 1),
    Compared("CPU µs/event", "drain", "cpu_us_per_event", 1),
    Compared("… with Postgres and Kafka", "drain", "cpu_us_per_event", 1, value=_everybody_us),
    Compared("peak MiB", "drain", "peak_mib"),
    Compared("lost", "faults", "lost"),
    Compared("doubled", "faults", "doubled"),
    Compared("reordered", "faults", "reordered"),
    Compared("latest event, s", "faults", "latest_s", 1),
)
LOADERS = {
    loader.STARS[0]: "**ours**, the whole star",
    loader.CURRENT: "**ours**, current state only",
    loader.JDBC: loader.JDBC,
    loader.BATCH: "`executemany` by 500",
    fault_loaders.GUARDED: "`executemany`, unique facts and a version guard",
}
LOADING = (
    Compared("events/s", loader.BESIDE, "events_per_s", more_is_better=True),
    Compared("CPU µs/event", loader.BESIDE, "cpu_us_per_event", 1),
    Compared(
        "… with Postgres and Kafka", loader.BESIDE, "cpu_us_per_event", 1, value=_everybody_us
    ),
    Compared("peak MiB", loader.BESIDE, "peak_mib"),
    Compared("lost", "loader faults", "lost"),
    Compared("out of date", "loader faults", "stale"),
    Compared("doubled", "loader faults", "doubled"),
    Compared("stood still, s", "loader faults", "standstill_s", 1),
)


def beside(results: Results) -> str:
    """Return, as Markdown for the README, everyone's figures, the best of each column bold."""
    figures = results.figures
    rows = _largest_backlog(figures)
    shown = [
        figure
        for figure in figures
        if not figure.get("open_transaction")
        and (figure["section"] != "drain" or figure["rows"] == rows)
        and (figure["section"] != "latency" or figure["rate"] == RATES[0])
    ]
    return "\n\n".join(
        (
            _compared("publisher", PUBLISHERS, PUBLISHING, shown),
            _compared("loader", LOADERS, LOADING, shown),
            f"Sections: {measured(results, {one.section for one in (*PUBLISHING, *LOADING)})}.",
        )
    )


def _largest_backlog(figures: Sequence[Figure]) -> int:
    """Return the largest backlog of those that most publishers have drained."""
    drained = [
        figure["rows"]
        for figure in figures
        if figure["section"] == "drain" and figure["contender"] in PUBLISHERS
        if not figure.get("error") and not figure["open_transaction"]
    ]
    return max(drained, key=lambda rows: (drained.count(rows), rows), default=0)


def _compared(
    what: str, names: dict[str, str], columns: Sequence[Compared], figures: Sequence[Figure]
) -> str:
    lines = [[what, *(column.heading for column in columns)], ["-", *["-:"] * len(columns)]]
    lines += [[label] for label in names.values()]
    for column in columns:
        found = [find(figures, section=column.section, contender=name) for name in names]
        values = [column.value(figure, column.field) if figure else None for figure in found]
        texts = ["-" if v is None else f"{v:,.{column.decimals}f}" for v in values]
        known = [value for value in values if value is not None]
        best = (max if column.more_is_better else min)(known, default=None)
        shown = "" if best is None else f"{best:,.{column.decimals}f}"
        all_alike = {text for text in texts if text != "-"} == {shown}
        for line, text in zip(lines[2:], texts, strict=True):
            line.append(f"**{text}**" if text == shown and not all_alike else text)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def distances(figures: Sequence[Figure]) -> Sheet:
    """Relay and worker, by the round trip to their servers."""
    columns = {
        "really ms": _number("round_trip_ms", 2),
        "events/s": _number("events_per_s"),
        "against 0 ms": _number("ratio", 2),
        "CPU µs/event": _number("cpu_us_per_event", 2),
        "round trips per 1,000 events, Kafka": _number("kafka_round_trips", 1),
        "Postgres": _number("postgres_round_trips", 1),
        "bytes/event to Kafka": _number("kafka_sent_bytes"),
        "from Kafka": _number("kafka_got_bytes"),
        "wrong": lambda figure: wrong(figure) or "-",
    }
    return _sheet(
        "By the round trip to Kafka and to Postgres",
        "round trip, part",
        [figure for figure in figures if "delay_ms" in figure],
        split.SECTION,
        name=lambda figure: f"{figure['delay_ms']} ms {figure['contender']}",
        columns=columns,
    )


def divided(figures: Sequence[Figure]) -> Sheet:
    """One reservation database beside two, each with its relay."""
    columns = {
        "events/s": _number("events_per_s"),
        "against one": _number("ratio", 2),
        "CPU µs/event": _number("cpu_us_per_event", 2),
        "loaded": _number("loaded_events"),
        "wrong": lambda figure: wrong(figure) or "-",
    }
    return _sheet(
        "One outbox, and one split into two, into one topic",
        "outbox of",
        [figure for figure in figures if figure.get("contender") in {split.ONE, split.TWO}],
        split.SECTION,
        name=lambda figure: f"{figure['contender']}, {figure['rows']:,} rows",
        columns=columns,
    )


# ---- the promises of the pattern


def _tolerance(figures: Sequence[Figure]) -> Sheet:
    found = find(figures, section="promise tolerance", contender="ours")
    rows = {
        "events committed and published meanwhile": _number("events"),
        f"… which is at {promises.BOOKINGS_PER_S} bookings/s so many hours": _number("hours", 3),
        "published by the relay, events/s": _number("published_per_s"),
        "from the start of the platform's database until all was loaded, s": _number(
            "caught_up_s", 1
        ),
        "loaded by one worker, events/s": _number("loaded_per_s"),
        "lost": _number("lost"),
        "doubled": _number("doubled"),
        "out of date": _number("stale"),
        "of no booking": _number("invented"),
    }
    title = "The platform is down for an hour's events, and comes back"
    told = [(what, text(found)) for what, text in rows.items()] if found else []
    return Sheet(title, ("what", "found"), told)


def _buffering(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "bookings/s": _number("per_s"),
        "p50 ms": _number("p50_ms", 1),
        "p99 ms": _number("p99_ms", 1),
        "failed": _number("failed"),
    }
    told = find(figures, section="promise buffering timeline")
    title = "Bookings while the loader goes at its own pace"
    if told:
        title += (
            f": {told['loader_per_s']:,.0f} events/s, the burst {told['times']:,.0f} times that; "
            f"{told['behind']:,} events behind when its way became short; in the end "
            f"{told['lost']} lost, {told['doubled']} doubled of {told['events']:,}"
        )
    section = "promise buffering"
    return _sheet(title, "when", figures, section, name=_contender, columns=columns)


def _batching(figures: Sequence[Figure]) -> Sheet:
    measured = [figure for figure in figures if figure["section"] == "promise batching"]
    rows = []
    for size in sorted({figure["batch"] for figure in measured if "batch" in figure}):
        found = [find(measured, contender=who, batch=size) for who in ("relay", "worker")]
        rows.append([f"{size:,}", *(f"{f['events_per_s']:,}" if f else "-" for f in found)])
    headings = ("rows at once", "relay, events/s", "worker, events/s")
    return Sheet("Events a second by how many are taken at once", headings, rows)


def _order(figures: Sequence[Figure]) -> Sheet:
    measured = [figure for figure in figures if figure["section"] == "promise order"]
    names = ("keys", "records", "lost", "doubled", "reordered")
    total = {name: sum(figure[name] for figure in measured) for name in names}
    rows = [
        [str(figure["contender"]), *(f"{figure[name]:,}" for name in names)]
        for figure in ([*measured, {"contender": "**all**", **total}] if measured else [])
    ]
    title = "Every record of every key, as a `read_committed` consumer sees the topic"
    return Sheet(title, ("published while", *names), rows)


def _workers_shared(figures: Sequence[Figure]) -> Sheet:
    alone = find(figures, section="promise workers", workers=1)
    columns = {
        "with partitions": _number("with_partitions"),
        "idle": _number("idle"),
        "most partitions of one": _number("largest_share"),
        "events/s": _number("events_per_s"),
        "times one": lambda f: f"{f['events_per_s'] / alone['events_per_s']:.2f}" if alone else "-",
        "cores busy": _number("cores_busy", 2),
        "lost": _number("lost"),
    }
    title = f"Workers on six partitions, their database {promise_group.TRIP_MS} ms away and back"
    return _sheet(title, "workers", figures, "promise workers", name=_contender, columns=columns)


def _rounds(
    figures: Sequence[Figure],
    section: str,
    title: str,
    columns: dict[str, str],
    sums: Sequence[str],
) -> Sheet:
    """Return a table of what was done several times: medians and worst ones, and sums."""
    measured = [f for f in figures if f["section"] == section and not f.get("error")]
    measured = [figure for figure in measured if "round" in figure]
    rows = []
    for name in dict.fromkeys(str(figure["contender"]) for figure in measured):
        rounds = [figure for figure in measured if figure["contender"] == name]
        row = [name, str(len(rounds))]
        for field in columns:
            values = [figure[field] for figure in rounds if figure.get(field) is not None]
            row.append(f"{median(values):.2f}, worst {max(values):.2f}" if values else "-")
        rows.append([*row, *(f"{sum(figure[name] for figure in rounds):,}" for name in sums)])
    return Sheet(title, ("what", "times", *columns.values(), *sums), rows)


def _worker_goes(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "longest_s": "longest until visible, its partitions, s",
        "others_s": "longest, the others' partitions, s",
    }
    told = find(figures, section="promise worker goes")
    title = "One of three workers goes" + (
        f"; this broker misses a silent member after {told['session_s']:g} s" if told else ""
    )
    return _rounds(figures, "promise worker goes", title, columns, ("events", "lost"))


def _failover(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "gap_s": "longest gap in a partition, s",
        "latest_s": "latest event, commit to topic, s",
    }
    told = find(figures, section="promise failover")
    title = "Three brokers, two relays" + (
        f"; a silent broker is missed after {told['session_s']:g} s" if told else ""
    )
    sums = ("events", "lost", "doubled")
    return _rounds(figures, "promise failover", title, columns, sums)


def _exactly_once(figures: Sequence[Figure]) -> Sheet:
    columns = {
        "events": _number("events"),
        "SIGKILLs": _number("kills"),
        "written, never committed": _number("aborted"),
        "repeated in the topic": _number("repeated"),
        "lost in the tables": _number("lost"),
        "doubled in the tables": _number("doubled"),
        "out of date": _number("stale"),
    }
    title = "The relay killed again and again amid publishing"
    section = "promise exactly once"
    return _sheet(title, "delivery", figures, section, name=_contender, columns=columns)


PROMISES: dict[str, Callable[[Sequence[Figure]], Sheet]] = {
    "tolerance": _tolerance,
    "buffering": _buffering,
    "batching": _batching,
    "order": _order,
    "workers": _workers_shared,
    "worker-goes": _worker_goes,
    "failover": _failover,
    "exactly-once": _exactly_once,
}
PROMISE_CHARTS = {"buffering", "batching", "workers", "failover"}


def _goals(figures: Sequence[Figure]) -> Sheet:
    rows = [
        (
            goal.what,
            f"{'≤' if goal.at_most else '≥'} {goal.wanted:g} {goal.unit}",
            "-" if goal.found is None else f"{goal.found:g} {goal.unit}",
            YES_NO[goal.reached],
        )
        for goal in [
            *goals(figures),
            *loader.goals(figures),
            *growth.goals(figures),
            *booking.goals(figures),
            *onsale.goals(figures),
            *outage.goals(figures),
            *scale.goals(figures),
        ]
    ]
    return Sheet("Must reach", ("what", "wanted", "found", "reached"), rows)


def _sheet(
    title: str,
    what: str,
    figures: Sequence[Figure],
    section: str = "",
    *,
    name: Callable[[Figure], str],
    columns: dict[str, Callable[[Figure], str]],
) -> Sheet:
    rows = []
    for figure in figures:
        if section in {"", figure["section"]}:
            cells = [FAILED, *[""] * (len(columns) - 1)]
            if not figure.get("error"):
                cells = [column(figure) for column in columns.values()]
            rows.append([name(figure), *cells])
    return Sheet(title, (what, *columns), rows)


def _contender(figure: Figure) -> str:
    return str(figure["contender"])


def _number(field: str, decimals: int = 0) -> Callable[[Figure], str]:
    def text(figure: Figure) -> str:
        value: Any = figure.get(field)
        return "-" if value is None else f"{value:,.{decimals}f}"

    return text
