"""The metrics: named as they should be, written down, and those that rules ask for exist."""

import re

import pytest

from tests.monitoring.dashboards import queries
from tests.monitoring.metrics_table import DOCUMENT, Metric, document, metrics, parts
from tests.monitoring.test_rules import RULES

ALL = [one for registry in parts().values() for one in metrics(registry)]
ASKED = re.compile(r"\b(?:reservation|outbox_relay|data_platform)_[a-z_]+")
RECORDED = re.compile(r"record: \S+")


def test_the_document_is_what_the_code_says() -> None:
    assert DOCUMENT.read_text("utf-8") == document(), "python -m tests.monitoring.metrics_table"


@pytest.mark.parametrize("metric", ALL, ids=lambda one: one.name)
def test_each_is_named_after_its_part_and_says_what_it_is(metric: Metric) -> None:
    assert re.fullmatch(r"(reservation|outbox_relay|data_platform)_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.text
    assert metric.kind != "histogram" or metric.name.endswith(("_seconds", "_rows"))


def test_rules_and_panels_ask_only_for_what_is_told() -> None:
    rules = "".join(file.read_text("utf-8") for file in RULES)
    text = RECORDED.sub("", rules) + " ".join(queries())
    text = re.sub(r"\b(service|topic):[a-z_0-9:]+", "", text)
    asked = {re.sub(r"_(bucket|count|sum)$", "", name) for name in ASKED.findall(text)}
    assert len(asked) > 20
    assert asked <= {one.name for one in ALL}
