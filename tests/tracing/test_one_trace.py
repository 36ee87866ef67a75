"""One trace from the click to the table; off, nothing of it is even imported."""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from devstack.processes import Process
from devstack.stack import Stack
from devstack.steps import Steps
from reservation_service.api import ID_MAX
from tests.compatibility.scene import Scene, said
from tests.tracing.collector import Collector
from tests.waiting import wait_until

pytestmark = [pytest.mark.needs_postgres, pytest.mark.needs_kafka]

REQUEST, PUBLISH, PROCESS = (
    f"POST /api/performances/<int(max={ID_MAX}):performance_id>/best-available",
    "publish concert-reservation",
    "process concert-reservation",
)
LOADED = "SELECT count(*) FROM analytics.fct_reservation_events WHERE reservation_id = %s"
HEADERS = "SELECT headers ->> 'traceparent' FROM outbox WHERE key = %s"
STOP_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Steps() as steps, Stack(1, steps) as made:
        made.start()
        with Scene(made) as scene:
            scene.command("reservation_service", "seed-demo")
        yield made


class Way:
    """Service, relay and worker on a stack, and a customer."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.url = scene.service("service")
        self.relay, self.worker = scene.relay("relay"), scene.worker("worker")
        scene.await_said(self.relay, "leading")
        scene.await_said(self.worker, "partitions_placed")
        self._token = scene.command("reservation_service", "token", "traced").splitlines()[-1]

    @property
    def parts(self) -> list[Process]:
        """The three programs."""
        return [self.scene.parts["service"], self.relay, self.worker]

    def book(self, traceparent: str | None = None) -> str:
        """Book a seat, and return the reservation's id."""
        concerts = httpx.get(f"{self.url}/api/concerts").json()["items"]
        performance_id = concerts[0]["performances"][0]["performance_id"]
        headers = {"Authorization": f"Bearer {self._token}"}
        answer = httpx.post(
            f"{self.url}/api/performances/{performance_id}/best-available",
            json={"count": 1, "confirm": True},
            headers=headers if traceparent is None else headers | {"traceparent": traceparent},
        )
        assert answer.status_code == 201, answer.text
        return str(answer.json()["reservation_id"])

    def await_loaded(self, reservation_id: str) -> None:
        """Wait until the analysts have it."""
        url = self.scene.stack.environment["ANALYST_DATABASE_URL"]
        with psycopg.connect(url, autocommit=True) as analyst:
            wait_until(
                lambda: analyst.execute(LOADED, [reservation_id]).fetchone() == (1,),
                30,
                "the event in the table",
            )


def header_of(stack: Stack, reservation_id: str) -> str:
    """Return the traceparent that the outbox, and so Kafka, has for a reservation's event."""
    with psycopg.connect(stack.environment["RESERVATION_OWNER_DATABASE_URL"]) as owner:
        return str((owner.execute(HEADERS, [reservation_id]).fetchone() or ("",))[0])


def test_one_trace_goes_from_the_click_to_the_table(stack: Stack) -> None:
    trace, caller = secrets.token_hex(16), secrets.token_hex(8)
    unsampled = secrets.token_hex(16)
    with Collector() as collector, Scene(stack, collector.environment) as scene:
        way = Way(scene)
        way.await_loaded(way.book(f"00-{unsampled}-{caller}-00"))
        reservation_id = way.book(f"00-{trace}-{caller}-01")
        way.await_loaded(reservation_id)
        wait_until(lambda: len(collector.of(trace)) == 3, 20, "three spans")
        own = way.book()
        way.await_loaded(own)
        own_trace = header_of(stack, own).split("-")[1]
        wait_until(lambda: len(collector.of(own_trace)) == 3, 20, "a trace that begins with us")

        found = collector.of(trace)
        request, publish, process = found[REQUEST], found[PUBLISH], found[PROCESS]
        assert (request.service, request.parent) == ("reservation-service", caller)
        assert (publish.service, publish.parent) == ("outbox-relay", request.span)
        assert (process.service, process.parent) == ("data-platform", request.span)
        assert request.attributes["http.response.status_code"] == "201"
        key = "messaging.kafka.message.key"
        assert publish.attributes[key] == process.attributes[key] == reservation_id
        assert header_of(stack, reservation_id) == f"00-{trace}-{request.span}-01"
        assert collector.of(own_trace)[REQUEST].parent == ""
        assert collector.of(unsampled) == {}
        assert [part.stop() for part in way.parts] == [0, 0, 0]


def test_a_frozen_collector_costs_spans_and_no_time(stack: Stack) -> None:
    with Collector() as collector, Scene(stack, collector.environment) as scene:
        collector.thaw.clear()
        way = Way(scene)
        way.await_loaded(way.book())
        wait_until(collector.asked.is_set, 20, "the collector to be asked")
        way.await_loaded(way.book())
        began_s = time.monotonic()
        assert [part.stop() for part in way.parts] == [0, 0, 0]
        assert time.monotonic() - began_s < STOP_WITHIN_S
        assert collector.spans == []


def test_a_collector_that_is_away_is_told_of_once(stack: Stack) -> None:
    with Collector() as gone:
        environment = gone.environment
    with Scene(stack, environment | {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}) as scene:
        way = Way(scene)
        for _ in range(3):
            way.await_loaded(way.book())
        scene.await_said(way.worker, "traces_dropped")
        way.await_loaded(way.book())
        assert [part.stop() for part in way.parts] == [0, 0, 0]
        assert said(way.worker, "traces_dropped") == 1


@pytest.fixture
def without_opentelemetry(tmp_path: Path) -> dict[str, str]:
    """Make each import of OpenTelemetry fail, as where the extra isn't installed."""
    package = tmp_path / "opentelemetry"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not installed')")
    return {"PYTHONPATH": str(tmp_path)}


def test_off_nothing_of_it_is_imported(stack: Stack, without_opentelemetry: dict[str, str]) -> None:
    trace = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
    with Scene(stack, without_opentelemetry) as scene:
        way = Way(scene)
        reservation_id = way.book(trace)
        way.await_loaded(reservation_id)
        assert header_of(stack, reservation_id) == trace
        assert [part.stop() for part in way.parts] == [0, 0, 0]


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("reservation_service", ("serve", "--port", "0")),
        ("outbox_relay", ("run",)),
        ("data_platform", ("run",)),
    ],
)
def test_on_without_the_extra_is_told_in_a_line(
    stack: Stack, without_opentelemetry: dict[str, str], package: str, arguments: tuple[str, ...]
) -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    with Scene(stack, without_opentelemetry | endpoint) as scene:
        part = scene.begin(f"{package}-without", package, *arguments)
        wait_until(lambda: not part.alive, 20, "its end")
        assert part.stop() == 2
        lines = part.log.read_text("utf-8").splitlines()
    assert len(lines) == 1
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in lines[0]
    assert "requirements/tracing.txt" in lines[0]
