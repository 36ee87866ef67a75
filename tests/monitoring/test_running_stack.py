"""A real Prometheus beside a running stack: every panel has its data, and no alert fires."""

import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack.application import Application, get_json
from devstack.customers import Customers
from devstack.stack import Stack
from devstack.state import free_port
from devstack.steps import Steps
from tests.monitoring.dashboards import EMPTY_WHEN_WELL, FOLDER, documents, queries
from tests.monitoring.test_rules import RULES
from tests.require import require
from tests.waiting import wait_until

CONFIGURATION = Path(__file__).parents[2] / "deploy/docker/prometheus/prometheus.yml"
STOP_TIMEOUT_S = 12.0
BOOKINGS = 60
# Each program, as its job is called, and how many there are.
PROGRAMS = (
    ("outbox-relay", 2, ("outbox_relay", "run")),
    ("data-platform", 2, ("data_platform", "run")),
    ("reconcile", 1, ("data_platform", "reconcile", "--every", "2")),
)


class Prometheus:
    """One that scrapes the stack."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, query: str) -> list[dict[str, Any]]:
        """What it says to a query; an error is raised."""
        text = urllib.parse.urlencode({"query": query})
        answer: Any = get_json(f"{self.url}/api/v1/query?{text}")
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def ready(self) -> bool:
        try:
            return bool(self.ask("up"))
        except OSError:
            return False


def configuration(targets: dict[str, list[str]]) -> dict[str, Any]:
    """What is deployed, with addresses in the place of names in a network of containers."""
    found: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text("utf-8"))
    assert {job["job_name"] for job in found["scrape_configs"]} == targets.keys()
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": list(map(str, RULES)),
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": addresses}]}
            for name, addresses in targets.items()
        ],
    }


def seats_of_a_performance(base_url: str) -> dict[int, list[int]]:
    concerts: Any = get_json(f"{base_url}/api/concerts")
    performance_id = concerts["items"][0]["performances"][0]["performance_id"]
    answer: Any = get_json(f"{base_url}/api/performances/{performance_id}/seats")
    return {performance_id: [seat["seat_id"] for seat in answer["seats"]]}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    require(program, "prometheus (Debian's package)")
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        Steps() as steps,
        Stack(1, steps) as stack,
        Application(stack) as application,
        ExitStack() as cleanup,
    ):
        stack.start()
        application.seed()
        base_url = application.serve()
        targets = {"reservation-service": [base_url.removeprefix("http://")]}
        for job, count, command in PROGRAMS:
            for number in range(count):
                metrics_port = str(free_port())
                env, name = {"METRICS_PORT": metrics_port}, f"{job}-{number}"
                process = stack.program(*command, name=name, env=env)
                cleanup.callback(process.stop, STOP_TIMEOUT_S)
                targets.setdefault(job, []).append(f"127.0.0.1:{metrics_port}")
        file, port = folder / "prometheus.yml", free_port()
        file.write_text(yaml.safe_dump(configuration(targets)), "utf-8")
        customers = Customers(
            base_url,
            base_url,
            secret_key=stack.environment["RESERVATION_SECRET_KEY"],
            seats_by_performance=seats_of_a_performance(base_url),
            on_booked=lambda _: None,
        )
        with (folder / "log").open("w") as log:
            running = subprocess.Popen(
                [
                    str(program),
                    f"--config.file={file}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=log,
            )
            cleanup.callback(running.wait, STOP_TIMEOUT_S)
            cleanup.callback(running.terminate)
            found = Prometheus(port)
            wait_until(found.ready, 30, "Prometheus")
            customers.book(BOOKINGS, 4)
            yield found


def test_the_dashboards_are_what_their_source_says() -> None:
    told = {file.name: file.read_text("utf-8") for file in FOLDER.glob("*.json")}
    assert told == dict(documents()), f"{Path(sys.executable).name} -m tests.monitoring.dashboards"


def test_every_query_of_every_panel_finds_something(prometheus: Prometheus) -> None:
    wanted = set(queries()) - EMPTY_WHEN_WELL.keys()

    def without_data() -> set[str]:
        return {query for query in wanted if not prometheus.ask(query)}

    wait_until(lambda: not without_data(), 60, "data for every panel")
    for query in EMPTY_WHEN_WELL:
        assert prometheus.ask(query) == [], "else it is none of these"


def test_no_alert_fires_nor_is_about_to(prometheus: Prometheus) -> None:
    published = 'sum(outbox_relay_published_events_total{topic="concert-reservation"})'
    wait_until(
        lambda: (
            bool(prometheus.ask(f"{published} >= {BOOKINGS}"))
            and bool(prometheus.ask(f"sum(data_platform_new_events_total) >= {published}"))
        ),
        60,
        "every event in the tables",
    )
    # What a start looks like may be pending for a moment.
    wait_until(lambda: prometheus.ask("ALERTS") == [], 60, "no alert to be pending")
    assert prometheus.ask('count_over_time(ALERTS{alertstate="firing"}[10m])') == []
    assert prometheus.ask("sum(outbox_relay_leader)")[0]["value"][1] == "1"
