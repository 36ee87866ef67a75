"""One HTML page about the bookings: charts, tables, nothing that has to be loaded from elsewhere.

Guarantees: all figures are of one moment (a single snapshot), read with an analyst's rights; the
page has the same size for ten performances and for ten thousand; whatever a title contains is
shown as text. The page needs no scripts and allows none.
"""

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from html import escape
from typing import Any

import psycopg
import pygal
from psycopg.rows import DictRow, dict_row
from pygal.style import Style

from data_platform import sql_report as sql

APPLICATION_NAME = "data-platform report"
CONNECT_TIMEOUT_S = 5
RESERVATION_TOPIC = "concert-reservation"
SHOWN_PERFORMANCES = 25
SHOWN_PARTITIONS = 100
TITLE_LENGTH_CHARACTERS = 40
CHART_WIDTH, CHART_HEIGHT = 860, 320
BAR_HEIGHT = 22
# ISO 4217: how many of the digits are behind the point, where it isn't two.
WITHOUT_MINOR_UNITS = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF"
WITH_THOUSANDTHS = "BHD IQD JOD KWD LYD OMR TND"
MINOR_DIGITS = dict.fromkeys(WITHOUT_MINOR_UNITS.split(), 0) | dict.fromkeys(
    WITH_THOUSANDTHS.split(), 3
)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Concert bookings</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff;
  max-width: 900px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; margin: 0; }}
h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem; }}
p {{ margin: .3rem 0 .8rem; color: #4a5568; }}
figure {{ margin: 0 0 1rem; }}
figcaption {{ font-size: .9rem; }}
svg {{ width: 100%; height: auto; display: block; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #dde3ea; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: anywhere; }}
th {{ font-weight: 600; }}
@media print {{
  @page {{ margin: 15mm; }}
  body {{ max-width: none; margin: 0; padding: 0; font-size: 10.5pt;
    print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
  section, figure, tr {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
  thead {{ display: table-header-group; }}
}}
</style>
</head>
<body>
<h1>Concert bookings</h1>
<p>{intro}</p>
{sections}
</body>
</html>
"""

NOTHING = "<p>None.</p>"


@dataclass(frozen=True)
class Figures:
    """What the page shows: rows of the statements of `sql_report`."""

    totals: Mapping[str, Any]
    sold: Sequence[Mapping[str, Any]]
    hours: Sequence[Mapping[str, Any]]
    occupancy: Sequence[Mapping[str, Any]]
    funnel: Mapping[str, Any]
    freshness: Sequence[Mapping[str, Any]]


def read(url: str) -> Figures:
    """Read the figures, all of one moment.

    Args:
        url: libpq connection string; an analyst's rights are enough.

    Raises:
        psycopg.Error: Postgres can't be reached, or is not migrated.
    """
    with psycopg.connect(
        url,
        application_name=APPLICATION_NAME,
        connect_timeout=CONNECT_TIMEOUT_S,
        row_factory=dict_row,
    ) as connection:
        connection.execute(sql.SESSION)
        connection.commit()
        connection.read_only = True
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        (totals,) = _rows(connection, sql.TOTALS, topic=RESERVATION_TOPIC)
        until = totals["last_event_at"] or totals["made_at"]
        (funnel,) = _rows(connection, sql.FUNNEL, until=until)
        return Figures(
            totals,
            _rows(connection, sql.SOLD),
            _rows(connection, sql.BOOKINGS_BY_HOUR, until=until),
            _rows(connection, sql.OCCUPANCY, limit=SHOWN_PERFORMANCES),
            funnel,
            _rows(connection, sql.FRESHNESS, limit=SHOWN_PARTITIONS),
        )


def _rows(
    connection: psycopg.Connection[DictRow], statement: str, **parameters: object
) -> list[DictRow]:
    return connection.execute(statement.encode(), parameters).fetchall()


def page(figures: Figures) -> str:
    """Return the page as HTML."""
    totals = figures.totals
    complete = totals["complete_up_to"]
    intro = (
        f"{totals['reservations']:,} reservations, {totals['performances']:,} performances. "
        f"Made on {_moment(totals['made_at'])}; "
        + (f"complete up to {_moment(complete)}." if complete else "not known how complete.")
    )
    sections = (
        _sold(figures.sold),
        _hours(figures.hours),
        _occupancy(figures.occupancy, totals["performances"]),
        _funnel(figures.funnel),
        _freshness(figures.freshness),
    )
    return PAGE.format(intro=escape(intro), sections="\n".join(sections))


def _sold(rows: Sequence[Mapping[str, Any]]) -> str:
    table = _table(
        ("Currency", "Bookings", "Seats", "Revenue"),
        [
            (
                row["currency"],
                f"{row['bookings']:,}",
                f"{row['seats']:,}",
                _money(row["revenue"], row["currency"]),
            )
            for row in rows
        ],
    )
    return _section("Sold", "Completed bookings that stand, in each currency.", table)


def _hours(rows: Sequence[Mapping[str, Any]]) -> str:
    chart = _chart(pygal.Bar, CHART_HEIGHT, ["#1f6feb"])
    chart.x_labels = [f"{row['hour']:%d %b %H:00}" for row in rows]
    chart.x_labels_major_every, chart.show_minor_x_labels = 6, False
    chart.add("bookings", [row["bookings"] for row in rows])
    note = "Completed bookings in each of the last 48 hours before the newest event (UTC)."
    nothing = not any(row["bookings"] for row in rows)
    content = NOTHING if nothing else _figure(chart, "hours", "Bookings completed in an hour")
    return _section("Bookings by hour", note, content)


def _occupancy(rows: Sequence[Mapping[str, Any]], performances: int) -> str:
    if not rows:
        return _section("Occupancy by performance", "No performances yet.", "")
    fullest = _chart(pygal.HorizontalBar, 60 + BAR_HEIGHT * len(rows), ["#1f6feb"])
    shown = rows[::-1]  # the first one on top
    fullest.x_labels = [f"{_short(row['title'])}, {row['starts_at']:%d %b %Y}" for row in shown]
    fullest.value_formatter = lambda value: f"{value:,.0f} %"
    fullest.add("seats booked", [_percent(row["occupancy"]) for row in shown])
    fullest.range = (0, max([100.0, *(_percent(row["occupancy"]) or 0.0 for row in rows)]))
    tenths = _chart(pygal.Bar, 240, ["#3f8f68"])
    tenths.x_labels = [f"{tenth * 10}-{tenth * 10 + 10} %" for tenth in range(10)]
    tenths.add("performances", rows[0]["by_tenth"])
    table = _table(
        ("Concert", "Starts (UTC)", "Capacity", "Booked", "Held"),
        [
            (
                row["title"] or "unknown",
                f"{row['starts_at'].astimezone(UTC):%Y-%m-%d %H:%M}",
                "unknown" if row["capacity"] is None else f"{row['capacity']:,}",
                f"{row['booked_seats']:,}",
                f"{row['held_seats']:,}",
            )
            for row in rows
        ],
    )
    note = "Seats in bookings that stand, of all seats; cancelled performances are left out."
    charts = _figure(
        fullest, "occupancy", f"The fullest {len(rows)} of {performances:,} performances"
    ) + _figure(tenths, "tenths", "How many of all performances are how full")
    return _section("Occupancy by performance", note, charts + table)


def _funnel(row: Mapping[str, Any]) -> str:
    steps = {
        "started": "#1f6feb",
        "completed": "#3f8f68",
        "hold cancelled": "#d9822b",
        "expired": "#b3394b",
        "still open": "#8a8f98",
        "completed, then cancelled": "#a56316",
    }
    names = (
        *("started", "completed", "cancelled_before_completion", "expired", "open"),
        "cancelled_after_completion",
    )
    chart = _chart(pygal.HorizontalBar, 60 + 2 * BAR_HEIGHT * len(names), ["#1f6feb"])
    chart.x_labels = list(steps)[::-1]
    values = [
        {"value": row[name], "color": color}
        for name, color in zip(names, steps.values(), strict=True)
    ]
    chart.add("reservations", values[::-1])
    note = "What became of the reservations begun in the last 30 days before the newest event."
    if not row["started"]:
        return _section("Funnel", note, NOTHING)
    note += f" {row['completed'] / row['started']:.1%} were completed"
    mean = row["mean_seconds_to_complete"]
    note += f", after {mean:,.0f} s on average." if mean is not None else "."
    return _section("Funnel", note, _figure(chart, "funnel", "Reservations by what became of them"))


def _freshness(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return _section("Freshness", "No worker has loaded anything yet.", "")
    chart = _chart(pygal.HorizontalBar, 60 + BAR_HEIGHT * len(rows), ["#1f6feb"])
    shown = rows[::-1]
    chart.x_labels = [f"{row['topic']} {row['kafka_partition']}" for row in shown]
    chart.add("seconds behind", [row["lag_seconds"] for row in shown])
    table = _table(
        ("Partition", "Newest event (UTC)", "Last load", "Complete up to", "Dead letters"),
        [
            (
                f"{row['topic']} {row['kafka_partition']}",
                *(
                    _moment(row[name]).removesuffix(" UTC")
                    for name in ("last_event_at", "last_load_at", "complete_up_to")
                ),
                f"{row['dead_letters']:,}",
            )
            for row in rows
        ],
    )
    note = "How far behind Kafka the tables are: a few seconds while workers keep up."
    caption = "Seconds since each partition was known to be loaded to its end"
    return _section("Freshness", note, _figure(chart, "freshness", caption) + table)


# ---- how things look


def _section(title: str, note: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>\n{content}\n</section>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return NOTHING
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(_readable(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _chart(kind: type[pygal.Graph], height: int, colors: Sequence[str]) -> pygal.Graph:
    style = Style(
        colors=list(colors),
        background="white",
        plot_background="white",
        opacity=".7",
        guide_stroke_color="#dde3ea",
        major_guide_stroke_color="#c3ccd6",
        guide_stroke_dasharray="0",
        major_guide_stroke_dasharray="0",
        font_family="system-ui, sans-serif",
        label_font_size=11,
        major_label_font_size=11,
        value_font_size=11,
    )
    return kind(
        style=style,
        width=CHART_WIDTH,
        height=height,
        js=[],
        show_legend=False,
        range_min=0,
        max_scale=8,
        include_x_axis=True,
        truncate_label=TITLE_LENGTH_CHARACTERS + 20,
        no_data_text="not known",
        value_formatter=lambda value: f"{value:,.0f}" if value == int(value) else f"{value:,.1f}",
        print_values=kind is pygal.HorizontalBar,
        disable_xml_declaration=True,
    )


def _figure(chart: pygal.Graph, name: str, caption: str) -> str:
    chart.uuid = name  # prefixes its styles, which would else be the whole page's
    root = chart.render_tree()
    for parent in list(root.iter()):
        for script in [child for child in parent if child.tag == "script"]:
            parent.remove(script)
    root.set("role", "img")
    root.set("aria-label", caption)
    drawn = ET.tostring(root, encoding="unicode")
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawn}</figure>\n"


def _short(title: str | None) -> str:
    text = _readable(title or "unknown")
    kept = TITLE_LENGTH_CHARACTERS
    return text if len(text) <= kept else f"{text[: kept - 1]}…"


def _readable(text: str) -> str:
    """Return a text without the control characters that XML forbids."""
    return "".join(char if char.isprintable() else " " for char in text)


def _percent(occupancy: Any) -> float | None:
    return None if occupancy is None else float(occupancy) * 100


def _money(amount: int, currency: str | None) -> str:
    digits = MINOR_DIGITS.get(currency or "", 2)
    return f"{Decimal(amount).scaleb(-digits):,.{digits}f}"


def _moment(when: datetime | None) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if when else "never"
