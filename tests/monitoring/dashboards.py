"""`python -m tests.monitoring.dashboards`: write Grafana's dashboards again.

What a panel asks stands here, once; Grafana's form of it is made. A test runs every query.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[2] / "deploy" / "docker" / "grafana" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH, HEIGHT = 12, 8


class Panel(NamedTuple):
    """A chart: its title, Grafana's unit, and a legend for each query."""

    title: str
    unit: str
    queries: Mapping[str, str]


def quantiles(metric: str, by: str = "") -> dict[str, str]:
    """Return the queries of a histogram's median and 99th percentile."""
    legend = f" {{{{{by}}}}}" if by else ""
    labels = f"le, {by}" if by else "le"
    rates = f"sum by ({labels}) (rate({metric}_bucket[1m]))"
    return {
        f"histogram_quantile({q}, {rates})": f"p{q[2:]}{legend}".replace("p5", "p50")
        for q in ("0.5", "0.99")
    }


AGE = "topic:outbox_relay_oldest_unpublished_age_seconds:max"
FRESH = "topic:data_platform_freshness_seconds"
DASHBOARDS: Mapping[str, list[Panel]] = {
    "Booking": [
        Panel(
            "Requests by status",
            "reqps",
            {"sum by (status) (rate(reservation_http_requests_total[1m]))": "{{status}}"},
        ),
        Panel("Share of 5xx", "percentunit", {"service:reservation_http_errors:ratio1m": "5xx"}),
        Panel("Time to answer", "s", quantiles("reservation_http_request_seconds")),
        Panel(
            "What came of changes",
            "ops",
            {
                "sum by (action, outcome) (rate(reservation_changes_total[1m]))": (
                    "{{action}} {{outcome}}"
                )
            },
        ),
        Panel(
            "Connections in use",
            "none",
            {
                "sum(reservation_pool_busy_connections)": "in use",
                "sum(reservation_pool_max_connections)": "at most",
            },
        ),
        Panel("Waiting for a connection", "s", quantiles("reservation_pool_wait_seconds")),
        Panel(
            "Requests without a connection",
            "ops",
            {"sum(rate(reservation_pool_refusals_total[1m]))": "refused"},
        ),
    ],
    "Relay": [
        Panel(
            "Who leads",
            "none",
            {
                "sum(outbox_relay_leader)": "leading",
                "sum(outbox_relay_standby)": "standing by",
            },
        ),
        Panel(
            "Published",
            "ops",
            {"sum by (topic) (rate(outbox_relay_published_events_total[1m]))": "{{topic}}"},
        ),
        Panel("Age of the oldest unpublished event", "s", {AGE: "{{topic}}"}),
        Panel(
            "Unpublished events",
            "none",
            {"max by (topic) (outbox_relay_lag_rows)": "{{topic}}"},
        ),
        Panel(
            "From insert to acknowledgement",
            "s",
            quantiles("outbox_relay_commit_to_ack_seconds", "topic"),
        ),
        Panel("Events together", "none", quantiles("outbox_relay_batch_rows", "topic")),
        Panel(
            "Failed attempts",
            "ops",
            {"sum by (reason, topic) (rate(outbox_relay_retries_total[1m]))": "{{reason}}"},
        ),
        Panel(
            "Quarantine",
            "none",
            {"max by (topic) (outbox_relay_quarantined)": "{{topic}}"},
        ),
        Panel(
            "Kafka's partitions that lack something",
            "none",
            {
                "sum(outbox_relay_under_replicated_partitions)": "a replica",
                "sum(outbox_relay_leaderless_partitions)": "a leader",
            },
        ),
        Panel(
            "Partitions of the outbox",
            "none",
            {
                "max(outbox_relay_outbox_partitions)": "partitions",
                "max(outbox_relay_outbox_default_filled)": "default filled",
            },
        ),
    ],
    "Loader": [
        Panel(
            "Loaded",
            "ops",
            {
                "sum(rate(data_platform_events_total[1m]))": "events",
                "sum(rate(data_platform_new_events_total[1m]))": "new ones",
            },
        ),
        Panel("Not loaded", "none", {"topic:data_platform_lag_records:min": "{{topic}}"}),
        Panel("Age of the tables", "s", {FRESH: "{{topic}}"}),
        Panel("Duration of a load", "s", quantiles("data_platform_load_seconds")),
        Panel(
            "Dead letters",
            "none",
            {
                "max(data_platform_dead_letters_kept)": "kept",
                "sum(data_platform_dead_letters_total)": "since the start",
            },
        ),
        Panel(
            "Trouble",
            "none",
            {
                "sum(data_platform_waiting)": "waiting",
                "sum(data_platform_stopped_partitions)": "stopped partitions",
                "sum(rate(data_platform_waits_total[1m]))": "waits/s",
                "sum(rate(data_platform_places_lost_total[1m]))": "places lost/s",
            },
        ),
    ],
    "End to end": [
        Panel(
            "From the booking to the table",
            "ops",
            {
                'sum(rate(reservation_changes_total{outcome="done"}[1m]))': "changes",
                "sum(rate(outbox_relay_published_events_total[1m]))": "published",
                "sum(rate(data_platform_new_events_total[1m]))": "loaded",
            },
        ),
        Panel("How late", "s", {f"max({AGE})": "Kafka", f"max({FRESH})": "tables"}),
        Panel("Targets that answer", "none", {"sum by (job) (up)": "{{job}}"}),
        Panel(
            "Differences found by reconcile",
            "none",
            {
                "max(data_platform_reconcile_differences)": "differences",
                "max(data_platform_reconcile_unexamined)": "unexamined",
                "max(data_platform_reconcile_in_flight)": "in flight",
            },
        ),
        Panel(
            "Since the last comparison",
            "s",
            {"time() - max(data_platform_reconcile_last_run_timestamp_seconds)": "age"},
        ),
        Panel("Alerts", "none", {'count by (alertname) (ALERTS{alertstate="firing"})': "alerts"}),
    ],
}
# Where all is well these have nothing to show, and why.
EMPTY_WHEN_WELL = {
    "sum by (reason, topic) (rate(outbox_relay_retries_total[1m]))": "nothing has failed",
    'count by (alertname) (ALERTS{alertstate="firing"})': "nothing fires",
}


def queries() -> Iterator[str]:
    """Yield each query of each panel."""
    for panels in DASHBOARDS.values():
        for panel in panels:
            yield from panel.queries


def documents() -> Mapping[str, str]:
    """Return each dashboard's file name and text."""
    return {
        f"{title.lower().replace(' ', '-')}.json": json.dumps(_dashboard(title), indent=1) + "\n"
        for title in DASHBOARDS
    }


def _dashboard(title: str) -> dict[str, Any]:
    return {
        "uid": title.lower().replace(" ", "-"),
        "title": title,
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "panels": [_panel(at, panel) for at, panel in enumerate(DASHBOARDS[title])],
    }


def _panel(at: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": at + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"x": at % 2 * WIDTH, "y": at // 2 * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + n), "expr": query, "legendFormat": legend}
            for n, (query, legend) in enumerate(panel.queries.items())
        ],
    }


def main() -> None:
    """Write the dashboards again."""
    for name, text in documents().items():
        (FOLDER / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
