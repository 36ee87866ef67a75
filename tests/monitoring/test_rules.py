"""The rules, as promtool judges them: silent where all is well, and each alert where it is due."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.require import require

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy" / "docker" / "prometheus" / "rules").glob("*.yml"))
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for file in RULES
    for group in yaml.safe_load(file.read_text("utf-8"))["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
TOPIC = '{topic="concert-reservation"}'
COMPLETE = f"data_platform_complete_up_to_timestamp_seconds{TOPIC}"
RUN_AT = "data_platform_reconcile_last_run_timestamp_seconds"
OK = 'reservation_http_requests_total{status="201"}'
FAILED = 'reservation_http_requests_total{status="503"}'
# A sample each 15 s, for an hour; time begins at 0.
ZERO, ONE, CLOCK = "0x240", "1x240", "0+15x240"
NORMAL = {
    'up{job="reservation-service"}': ONE,
    'up{job="outbox-relay"}': ONE,
    'up{job="data-platform"}': ONE,
    OK: "0+300x240",
    # A single failure among thousands is nobody's alarm.
    FAILED: "0x100 1x140",
    "reservation_pool_max_connections": "16x240",
    "reservation_pool_busy_connections": "8x240",
    "reservation_pool_refusals_total": "3x240",
    'outbox_relay_leader{instance="a"}': ONE,
    'outbox_relay_leader{instance="b"}': ZERO,
    f"outbox_relay_oldest_unpublished_age_seconds{TOPIC}": "0.02x240",
    f"outbox_relay_lag_rows{TOPIC}": "0 20000 0x238",
    f"outbox_relay_quarantined{TOPIC}": ZERO,
    f"outbox_relay_under_replicated_partitions{TOPIC}": ZERO,
    f"outbox_relay_leaderless_partitions{TOPIC}": ZERO,
    "outbox_relay_outbox_partitions": "12x240",
    "outbox_relay_outbox_default_filled": ZERO,
    COMPLETE: CLOCK,
    "data_platform_stopped_partitions": ZERO,
    "data_platform_dead_letters_kept": ZERO,
    "data_platform_reconcile_differences": ZERO,
    "data_platform_reconcile_unexamined": ZERO,
    RUN_AT: CLOCK,
}
GONE = "1x100 _x140"
WRONG: list[tuple[set[str], dict[str, str]]] = [
    ({"TargetDown"}, {'up{job="outbox-relay",instance="b"}': "1x100 0x140"}),
    ({"JobGone"}, {'up{job="data-platform"}': GONE}),
    ({"ServiceFails"}, {FAILED: "0x100 0+6x140"}),
    ({"PoolSaturated"}, {"reservation_pool_busy_connections": "8x100 16x140"}),
    ({"PoolSaturated"}, {"reservation_pool_refusals_total": "3x100 3+1x140"}),
    ({"NoRelayLeads"}, {'outbox_relay_leader{instance="a"}': "1x100 0x140"}),
    (
        {"NoRelayLeads"},
        {'outbox_relay_leader{instance="a"}': GONE, 'outbox_relay_leader{instance="b"}': GONE},
    ),
    ({"RelayBehind"}, {f"outbox_relay_oldest_unpublished_age_seconds{TOPIC}": "0x100 0+15x140"}),
    ({"OutboxBacklogGrows"}, {f"outbox_relay_lag_rows{TOPIC}": "0x100 0+1000x140"}),
    ({"EventsInQuarantine"}, {f"outbox_relay_quarantined{TOPIC}": "0x100 1x140"}),
    ({"UnderReplicated"}, {f"outbox_relay_under_replicated_partitions{TOPIC}": "0x100 6x140"}),
    ({"PartitionsWithoutLeader"}, {f"outbox_relay_leaderless_partitions{TOPIC}": "0x100 1x140"}),
    ({"OutboxGrows"}, {"outbox_relay_outbox_partitions": "12x100 16x140"}),
    ({"OutboxDefaultFilled"}, {"outbox_relay_outbox_default_filled": "0x100 1x140"}),
    ({"TablesStale"}, {COMPLETE: "0+15x100 1500x140"}),
    ({"PartitionStopped"}, {"data_platform_stopped_partitions": "0x100 1x140"}),
    ({"DeadLetters"}, {"data_platform_dead_letters_kept": "0x100 1x140"}),
    ({"ReconcileDiffers"}, {"data_platform_reconcile_differences": "0x100 2x140"}),
    ({"ReconcileDiffers"}, {"data_platform_reconcile_unexamined": "0x100 2x140"}),
    ({"ReconcileOld"}, {RUN_AT: "-5000x240"}),
]


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    require(found, "promtool (Debian's prometheus)")
    return subprocess.run(
        [str(found), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def firing(eval_time: str, alerts: set[str]) -> dict[str, Any]:
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(alerts)]
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {"expr": query, "eval_time": eval_time, "exp_samples": samples}


def case(name: str, series: dict[str, str], expected: set[str]) -> dict[str, Any]:
    """After 24 minutes all is well, after 55 the alerts in `expected` fire, and no other."""
    found = [{"series": one, "values": values} for one, values in (NORMAL | series).items()]
    checks = [firing("24m", set()), firing("55m", expected)]
    return {"name": name, "interval": "15s", "input_series": found, "promql_expr_test": checks}


def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", *map(str, RULES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_is_due_and_no_other_and_none_where_all_is_well(
    tmp_path: Path,
) -> None:
    cases = [case("all is well", {}, set())]
    cases += [case(f"{'/'.join(due)} {next(iter(one))}", one, due) for due, one in WRONG]
    document = {"rule_files": list(map(str, RULES)), "evaluation_interval": "15s", "tests": cases}
    file = tmp_path / "rules_test.yml"
    file.write_text(yaml.safe_dump(document), "utf-8")
    done = promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set().union(*(due for due, _ in WRONG)) == set(ALERTS), "each alert has its case"


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as its readers' programs make them."""
    heads = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_leads_to_a_step_that_exists(name: str) -> None:
    annotations = ALERTS[name]["annotations"]
    document, _, anchor = annotations["runbook_url"].partition("#")
    assert anchor in anchors(ROOT / document)
    assert annotations["summary"]
