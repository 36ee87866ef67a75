"""`python -m tests.monitoring.metrics_table`: write docs/metrics.md again, from the code."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry

import data_platform.health
import data_platform.reconcile_loop
import outbox_relay.metrics
import reservation_service.metrics  # noqa: F401 - they are in the default registry

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
HEAD = """# Metrics

Made from the code by `python -m tests.monitoring.metrics_table`. What to alert on is in
`deploy/docker/prometheus/rules/`, what to do then in
[operations.md](operations.md#what-to-do-when), what to look at in
`deploy/docker/grafana/dashboards/`. The service's `/metrics` is on its own port and sums all of
its workers, of gauges those that live; the others' is on `METRICS_PORT`. A histogram has
`_bucket`, `_sum` and `_count`.
"""


class Metric(NamedTuple):
    """A metric as it is asked for."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def parts() -> dict[str, CollectorRegistry]:
    """Return by part where its metrics are."""
    return {
        "The service": REGISTRY,
        "The relay": outbox_relay.metrics.Metrics().registry,
        "A worker": data_platform.health.Health().registry,
        "`data-platform reconcile --every`": data_platform.reconcile_loop.make_metrics()[0],
    }


def metrics(registry: CollectorRegistry) -> Iterator[Metric]:
    """Yield our metrics of a registry, in the order in which the code makes them."""
    for collector in registry._collector_to_names:
        labels = getattr(collector, "_labelnames", None)
        if labels is None:  # Python's own, which several workers can't tell
            continue
        (found,) = collector.collect()
        suffix = "_total" if found.type == "counter" else ""
        yield Metric(found.name + suffix, found.type, labels, found.documentation.rstrip("."))


def document() -> str:
    """Return the whole of docs/metrics.md."""
    text = HEAD
    for part, registry in parts().items():
        text += f"\n## {part}\n\n| metric | kind | labels | |\n|-|-|-|-|\n"
        for one in metrics(registry):
            text += f"| `{one.name}` | {one.kind} | {', '.join(one.labels)} | {one.text} |\n"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document(), "utf-8")
