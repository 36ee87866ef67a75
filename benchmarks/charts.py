"""Charts of a run as SVG, which need neither scripts nor fonts from elsewhere."""

import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import ceil, floor, log10
from pathlib import Path

import pygal
from pygal.style import Style

from benchmarks import outage, scale
from benchmarks.latency import RATES
from benchmarks.results import Figure, Results, find

COLORS = {
    "at_least_once": "#1f6feb",
    "exactly_once": "#0b3d91",
    "debezium": "#d9822b",
    "polling": "#8a8f98",
    "raw-read": "#7fbf9b",
    "raw-produce": "#3f8f68",
    outage.OURS: "#1f6feb",
    outage.INSIDE: "#d9822b",
    outage.AFTER: "#8a8f98",
    scale.WORKER: "#3f8f68",
}
DISTANT = ("at_least_once", "exactly_once", scale.WORKER)
WAYS = {
    outage.OURS: "outbox (ours)",
    outage.INSIDE: "HTTP call before COMMIT",
    outage.AFTER: "HTTP call after COMMIT",
}
WRONG_TITLE = "Bookings that fail, or whose event is lost, % (data platform …)"
P99_TITLE = "Booking p99, ms, logarithmic (data platform …)"
QUANTILES = ("p50_ms", "p99_ms")
SOAK_COLORS = ("#1f6feb", "#d9822b", "#3f8f68", "#8a8f98", "#0b3d91", "#b3261e", "#7fbf9b")
SOAK_CHARTS = {
    "soak-memory": ("Memory, MiB, by minute", " MiB"),
    "soak-files": ("Open files, by minute", " files"),
    "soak-bytes": ("Bytes of table and indexes per reservation, by minute", " bytes"),
    "soak-latency": ("Latency of a booking, ms, by minute", "_ms"),
}
PROMISE_LINES = ("booked", "loaded")
POWERS_OF_TEN = [10**power for power in range(6)]
WIDTH, HEIGHT = 720, 340


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the charts for which the run has figures; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chart in drawn(results).items():
        path = folder / f"{name}.svg"
        path.write_text(_picture(chart, name), encoding="utf-8")
        written.append(path)
    return written


def drawn(results: Results) -> dict[str, pygal.Graph]:
    """Return the charts for which the run has figures, by their files' names."""
    figures = [figure for figure in results.figures if not figure.get("error")]
    charts = {
        "drain": _drain(figures),
        "cost-per-event": _cost(figures),
        "latency": _latency(figures),
        "growth": _growth(figures),
        "distance": _distance(figures),
        "outage-wrong": _outage(figures, WRONG_TITLE, _wrong_percent),
        "outage-p99": _outage(
            figures, P99_TITLE, lambda figure: float(figure["p99_ms"]), logarithmic=True
        ),
        "promise-buffering": _promise_buffering(figures),
        "promise-batching": _promise_batching(figures),
        "promise-workers": _promise_workers(figures),
        "promise-failover": _promise_failover(figures),
        **_soak([figure for figure in figures if figure["section"] == "soak"]),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}


def _picture(chart: pygal.Graph, name: str) -> str:
    """Return a chart as a picture in a page: no scripts, the same file for the same figures."""
    chart.uuid = name  # prefixes its styles; else a random one
    root = chart.render_tree()
    for parent in list(root.iter()):
        for script in [child for child in parent if child.tag == "script"]:
            parent.remove(script)
    return ET.tostring(root, encoding="unicode") + "\n"


def _soak(slices: Sequence[Figure]) -> dict[str, pygal.Graph]:
    """What has to stay flat, by the minutes of a soak."""
    charts: dict[str, pygal.Graph] = {}
    minutes = [f"{figure['at_s'] / 60:.0f}" for figure in slices]
    for name, (title, ending) in SOAK_CHARTS.items() if slices else ():
        charts[name] = chart = pygal.Line(
            title=title, style=_style(SOAK_COLORS), width=WIDTH, height=HEIGHT, js=[],
            show_dots=False, range_min=0, show_minor_x_labels=False,
            x_labels_major_every=max(1, len(minutes) // 10),
        )  # fmt: skip
        chart.x_labels = minutes
        for kind in (kind for kind in slices[0] if kind.endswith(ending)):
            chart.add(kind.removesuffix(ending), [figure[kind] for figure in slices])
    return charts


def _drain(figures: Sequence[Figure]) -> pygal.Graph | None:
    """Events a second of the largest backlog that most have drained."""
    drained = _drained(figures)
    counts = {rows: sum(f["rows"] == rows for f in drained) for rows in _sizes(drained)}
    if not counts:
        return None
    rows = max(counts, key=lambda size: (counts[size], size))
    names = [name for name in COLORS if find(drained, rows=rows, contender=name)]
    chart = _chart(pygal.HorizontalBar, names, f"Drain of {rows:,} rows, events per second")
    for name in names:
        found = find(drained, rows=rows, contender=name)
        chart.add(_label(name), [found["events_per_s"] if found else None])
    chart.value_formatter = lambda value: f"{value:,.0f}"
    return chart


def _cost(figures: Sequence[Figure]) -> pygal.Graph | None:
    """Microseconds an event by the size of the backlog."""
    drained = _drained(figures)
    sizes = _sizes(drained)
    if len(sizes) < 2:
        return None
    names = [name for name in COLORS if find(drained, contender=name)]
    chart = _chart(
        pygal.Line, names, "Microseconds from one event to the next, by rows in the backlog"
    )
    chart.x_labels = [f"{rows:,}" for rows in sizes]
    for name in names:
        found = [find(drained, rows=rows, contender=name) for rows in sizes]
        chart.add(_label(name), [f["us_per_event"] if f else None for f in found])
    chart.value_formatter = lambda value: f"{value:,.1f}"
    return chart


def _latency(figures: Sequence[Figure]) -> pygal.Graph | None:
    """Median and 99th percentile at each rate."""
    measured = [figure for figure in figures if figure["section"] == "latency"]
    names = [name for name in COLORS if find(measured, contender=name)]
    if not names:
        return None
    chart = _chart(pygal.Bar, names, "From the commit to the consumer, ms")
    chart.x_labels = [f"{quantile[:3]} at {rate:,}/s" for rate in RATES for quantile in QUANTILES]
    for name in names:
        values = []
        for rate in RATES:
            found = find(measured, contender=name, rate=rate)
            values += [found[quantile] if found else None for quantile in QUANTILES]
        chart.add(_label(name), values)
    chart.value_formatter = lambda value: f"{value:.1f}"
    return chart


def _growth(figures: Sequence[Figure]) -> pygal.Graph | None:
    """CPU of an event by what the tables hold already."""
    measured = [figure for figure in figures if figure["section"] == "growth"]
    if len(measured) < 2:
        return None
    parts = {"cpu_us_per_event": "worker", "postgres_us_per_event": "Postgres"}
    title = "CPU microseconds per event loaded, by events in the tables"
    chart = _chart(pygal.StackedBar, ["at_least_once", "debezium"], title)
    chart.x_labels = [f"{figure['rows']:,}" for figure in measured]
    for field, label in parts.items():
        chart.add(label, [figure[field] for figure in measured])
    chart.value_formatter = lambda value: f"{value:,.1f}"
    return chart


def _outage(
    figures: Sequence[Figure],
    title: str,
    value: Callable[[Figure], float],
    *,
    logarithmic: bool = False,
) -> pygal.Graph | None:
    """What an outage of the data platform does to bookings, ours beside the old ways."""
    measured = [figure for figure in figures if figure["section"] == "ways"]
    names = [name for name in WAYS if find(measured, contender=name)]
    if not names:
        return None
    # One is thousands of times another: a scale of powers of ten, from 1 up.
    powers = {"logarithmic": True, "y_labels": POWERS_OF_TEN, "range_min": 1, "zero": 1}
    scale = powers if logarithmic else {}
    chart = _chart(pygal.Bar, names, title, **scale)
    chart.x_labels = list(outage.STATES)
    for name in names:
        found = [find(measured, contender=name, platform=state) for state in outage.STATES]
        chart.add(WAYS[name], [round(value(f), 1) if f else None for f in found])
    chart.value_formatter = lambda number: f"{number:,.0f}"
    return chart


def _distance(figures: Sequence[Figure]) -> pygal.Graph | None:
    """Events a second by the round trip to Kafka and to Postgres."""
    measured = [figure for figure in figures if "delay_ms" in figure]
    names = [name for name in DISTANT if find(measured, contender=name)]
    if not names:
        return None
    chart = _chart(pygal.Bar, names, "Events per second by the round trip to Kafka and Postgres")
    chart.x_labels = [f"{delay_ms} ms" for delay_ms in scale.DELAYS_MS]
    for name in names:
        found = [find(measured, contender=name, delay_ms=delay) for delay in scale.DELAYS_MS]
        chart.add(_label(name), [f["events_per_s"] if f else None for f in found])
    chart.value_formatter = lambda value: f"{value:,.0f}"
    return chart


def _wrong_percent(figure: Figure) -> float:
    wrong = int(figure["failed"]) + int(figure["lost_events"])
    return 100.0 * wrong / int(figure["customers"])


# ---- the promises of the pattern


def _promise_buffering(figures: Sequence[Figure]) -> pygal.Graph | None:
    """What was booked and loaded up to each second."""
    found = find(figures, section="promise buffering timeline")
    if not found:
        return None
    seconds = max(len(found[kind]) for kind in PROMISE_LINES)
    chart = pygal.Line(
        title="Bookings so far, and those in the analysts' tables so far", x_title="second",
        style=_style(SOAK_COLORS), width=WIDTH, height=HEIGHT, js=[], show_dots=False,
        range_min=0, show_minor_x_labels=False, x_labels_major_every=max(1, seconds // 10),
        legend_at_bottom=True,
    )  # fmt: skip
    chart.x_labels = [str(second) for second in range(seconds)]
    for kind in PROMISE_LINES:
        counts = found[kind] + [0] * (seconds - len(found[kind]))
        chart.add(kind, list(accumulate(counts)))
    return chart


def _promise_batching(figures: Sequence[Figure]) -> pygal.Graph | None:
    """Events a second by batch, each ten times the last on both axes."""
    measured = [f for f in figures if f["section"] == "promise batching" and "batch" in f]
    sizes = sorted({figure["batch"] for figure in measured})
    if len(sizes) < 2:
        return None
    chart = pygal.XY(
        title="Events a second by how many are taken at once, both logarithmic",
        style=_style(SOAK_COLORS), width=WIDTH, height=HEIGHT, js=[], logarithmic=True,
        legend_at_bottom=True,
    )  # fmt: skip
    chart.x_labels = [{"label": f"{size:,}", "value": size} for size in sizes]
    rates = [figure["events_per_s"] for figure in measured]
    powers = range(floor(log10(min(rates))), ceil(log10(max(rates))) + 1)
    chart.y_labels = [10**power for power in powers]
    chart.value_formatter = lambda value: f"{value:,.0f}"
    for who in ("relay", "worker"):
        found = {size: find(measured, contender=who, batch=size) for size in sizes}
        chart.add(who, [(size, f["events_per_s"]) for size, f in found.items() if f])
    return chart


def _promise_workers(figures: Sequence[Figure]) -> pygal.Graph | None:
    """Events a second by workers."""
    measured = [figure for figure in figures if figure["section"] == "promise workers"]
    if not measured:
        return None
    title = "Events a second by workers on six partitions"
    chart = _chart(pygal.Bar, ["exactly_once", "polling"], title)
    chart.x_title = "workers"
    counts = sorted({figure["workers"] for figure in measured if "workers" in figure})
    chart.x_labels = [str(count) for count in counts]
    for assignor in dict.fromkeys(figure.get("assignor") for figure in measured):
        found = [find(measured, workers=count, assignor=assignor) for count in counts]
        chart.add(f"shared out by {assignor}", [f["events_per_s"] if f else None for f in found])
    chart.value_formatter = lambda value: f"{value:,.0f}"
    return chart


def _promise_failover(figures: Sequence[Figure]) -> pygal.Graph | None:
    """The worst of all rounds, for each that is struck."""
    kinds = (("promise worker goes", "longest_s", "worker "), ("promise failover", "latest_s", ""))
    worst: dict[str, float] = {}
    for section, field, before in kinds:
        for figure in figures:
            if figure["section"] == section and figure.get(field) is not None:
                name = f"{before}{figure['contender']}"
                worst[name] = max(worst.get(name, 0.0), figure[field])
    if not worst:
        return None
    title = (
        "Latest event of all rounds, seconds from its commit: into the topic, of workers the tables"
    )
    chart = _chart(pygal.HorizontalBar, [], title)
    chart.config.style = _style(SOAK_COLORS)
    for name, seconds in worst.items():
        chart.add(name, [seconds])
    chart.value_formatter = lambda value: f"{value:,.1f}"
    return chart


def _drained(figures: Sequence[Figure]) -> list[Figure]:
    return [f for f in figures if f["section"] == "drain" and not f["open_transaction"]]


def _sizes(drained: Sequence[Figure]) -> list[int]:
    return sorted({figure["rows"] for figure in drained})


def _label(name: str) -> str:
    return {"polling": "SKIP LOCKED polling", "debezium": "Debezium"}.get(
        name, name.replace("_", " ")
    )


def _chart(
    kind: type[pygal.Graph], names: Sequence[str], title: str, **more: object
) -> pygal.Graph:
    style = _style([COLORS[name] for name in names])
    options: dict[str, object] = {
        "title": title,
        "style": style,
        "width": WIDTH,
        "height": HEIGHT,
        "js": [],
        "print_values": True,
        "print_values_position": "top",
        "range_min": 0,
        "include_x_axis": True,
        "legend_at_bottom": True,
    }
    return kind(**options | more)


def _style(colors: Sequence[str]) -> Style:
    return Style(
        colors=list(colors),
        background="white",
        plot_background="white",
        font_family="sans-serif",
        title_font_size=15,
        label_font_size=11,
        major_label_font_size=11,
        value_font_size=11,
        legend_font_size=12,
    )
