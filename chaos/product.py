"""The whole product, each part looked after and each way between two parts breakable.

Brokers, two Postgres servers, services, a sweeper, relays and workers; where it may, each server
has a small disk of its own.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg

from chaos import disks
from chaos.disks import Disk
from chaos.supervisor import Part, Supervisor
from chaos.wiring import Ways, WiredKafka, name_of
from devstack.application import get_json
from devstack.kafka import Broker
from devstack.postgres import PostgresServer
from devstack.processes import Process, Running, wait_until
from devstack.stack import Stack
from devstack.state import free_port
from devstack.steps import Steps

READY_TIMEOUT_S = 60.0
POSTGRES_DISK_MIB, BROKER_DISK_MIB = 640, 640
MAX_CONNECTIONS = 90
POSTGRES_SETTINGS = {
    "max_connections": str(MAX_CONNECTIONS),
    "min_wal_size": "32MB",
    "max_wal_size": "128MB",
    "shared_buffers": "64MB",
    # What nobody waits for is written late: so much more is forgotten by a crash.
    "wal_writer_delay": "10s",
}
HOLD_S = 8
SECTION_ROWS, ROW_SEATS = 40, 50
PERFORMANCES_PER_CONCERT = 10
ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Size:
    """How many of each there are; without `small_disks` nothing can be filled up."""

    brokers: int = 3
    services: int = 2
    relays: int = 2
    workers: int = 3
    small_disks: bool = True

    def clients_of_kafka(self) -> list[str]:
        """Who has ways of its own to the brokers."""
        return [*self.names("relay"), *self.names("worker")]

    def names(self, kind: str) -> list[str]:
        """The names of all parts of a kind, like `relay`."""
        count = int(getattr(self, f"{kind}s"))
        return [f"{kind}-{number}" for number in range(1, count + 1)]


class Server(PostgresServer):
    """A Postgres server that a supervisor looks after."""

    @property
    def running(self) -> Running:
        """What runs it, or ran it last."""
        assert self._process  # noqa: S101 - launched before anybody asks
        return self._process


class Product(Stack):
    """Everything, started by `start`. Use as a context manager.

    `supervisor.parts` has each part by its name, `ways` the network, `disks` the small disks by
    the server's name, `services` the URL of each service as clients reach it.
    """

    def __init__(
        self, size: Size, steps: Steps, *, delivery: str, environment: Mapping[str, str]
    ) -> None:
        self.size = size
        self.delivery = delivery
        self.services: dict[str, str] = {}
        self.disks: dict[str, Disk] = {}
        self._more = {"OUTBOX_RELAY_DELIVERY": delivery, **environment}
        self._processes: dict[str, Process] = {}
        self._ports: dict[str, int] = {}
        super().__init__(size.brokers, steps)
        self.supervisor = Supervisor([])

    # ---- making it

    def _make_servers(self, brokers: int, cleanup: ExitStack) -> None:
        self.ways = cleanup.enter_context(Ways())
        if self.size.small_disks and not disks.why_not():
            self._make_disks(cleanup)
        self.reservations: Server = self._server("reservations", cleanup)
        self.analytics: Server = self._server("analytics", cleanup)
        folders = {number: self._folder(f"broker-{number}") for number in range(1, 4)}
        self.kafka = self.wired = WiredKafka(
            self.run, brokers, self.ways, self.size.clients_of_kafka(), folders
        )
        cleanup.callback(self.kafka.close)

    def _make_disks(self, cleanup: ExitStack) -> None:
        sizes = {"reservations": POSTGRES_DISK_MIB, "analytics": POSTGRES_DISK_MIB}
        sizes |= dict.fromkeys(self.size.names("broker"), BROKER_DISK_MIB)
        for name, size_mib in sizes.items():
            disk = self.disks[name] = Disk(self.run.path / f"disk-{name}", size_mib)
            cleanup.callback(disk.close)

    def _folder(self, name: str) -> Path:
        return self.disks[name].folder if name in self.disks else self.run.path

    def _server(self, name: str, cleanup: ExitStack) -> Server:
        place = copy(self.run)  # the same run, whose files lie elsewhere
        place.path = self._folder(name)
        server = Server(place, name, POSTGRES_SETTINGS)
        # Its log must not be what finds the disk full.
        server.log = self.run.path / f"{name}.log"
        cleanup.callback(server.close)
        return server

    def start(self) -> None:
        """Start and fill everything; behind it every part answers, and nothing is looked after."""
        super().start()
        with self._steps.step("services, sweeper, relays and workers"):
            for name in self.size.names("service"):
                self._add_service(name)
            names = self.size
            parts = [*self._servers(), *(self._program_part(n) for n in names.names("service"))]
            parts += [self._program_part(name) for name in ("sweeper",)]
            parts += [self._program_part(name) for name in names.names("relay")]
            parts += [self._program_part(name) for name in names.names("worker")]
            self.supervisor = Supervisor(parts)
            wait_until(
                lambda: all(map(ready, self.services.values())), READY_TIMEOUT_S, "the services"
            )

    def _servers(self) -> list[Part]:
        def server(one: Server) -> Part:
            return Part(one.name, one.launch, lambda: one.running)

        def broker(one: Broker) -> Part:
            return Part(name_of(one), one.launch, lambda: one.process)

        servers = [server(one) for one in (self.reservations, self.analytics)]
        return servers + [broker(one) for one in self.kafka.brokers]

    def _add_service(self, name: str) -> None:
        port = free_port()
        self._ports[name] = port
        self.services[name] = f"http://127.0.0.1:{self.ways.add('clients', name, port)}"

    def _program_part(self, name: str) -> Part:
        """Start one of our programs, and return what starts it again."""
        arguments = self._arguments(name)
        environment = self._environment(name)

        def launch() -> None:
            self._processes[name] = self.program(
                *arguments, name=name, env=environment | part.environment
            )

        part = Part(name, launch, lambda: self._processes[name])
        launch()
        # Whatever runs then: it will have been started again.
        self._cleanup.callback(lambda: self._processes[name].kill())  # noqa: PLW0108
        return part

    def _arguments(self, name: str) -> tuple[str, ...]:
        if name == "sweeper":
            return "reservation_service", "expire-holds", "--every", "1"
        if name.startswith("service"):
            port = str(self._ports[name])
            return "reservation_service", "serve", "--port", port, "--workers", "1"
        return "outbox_relay" if name.startswith("relay") else "data_platform", "run"

    def _environment(self, name: str) -> dict[str, str]:
        """Let a program reach its servers by ways of its own only."""
        own: dict[str, str] = {}
        databases = {
            "relay": ("OUTBOX_RELAY_DATABASE_URL", self.reservations),
            "worker": ("ANALYTICS_DATABASE_URL", self.analytics),
        }
        variable, server = databases.get(
            name.partition("-")[0], ("RESERVATION_DATABASE_URL", self.reservations)
        )
        url = self.environment[variable]
        port = self.ways.add(name, server.name, server.port)
        own[variable] = url.replace(f"@127.0.0.1:{server.port}/", f"@127.0.0.1:{port}/")
        assert own[variable] != url, variable  # noqa: S101 - else nothing would pass the proxy
        if name in self.size.clients_of_kafka():
            own["KAFKA_BOOTSTRAP_SERVERS"] = self.wired.servers_for(name)
        # What a killed one leaves in a temporary folder goes with the run.
        own["TMPDIR"] = str(self.run.path)
        return {"RESERVATION_HOLD_SECONDS": str(HOLD_S), **self._more, **own}

    # ---- using it

    def part(self, name: str) -> Part:
        """Return a part by its name."""
        return self.supervisor.parts[name]

    @contextmanager
    def connected(self, variable: str) -> Iterator[psycopg.Connection]:
        """Connect to a database directly, by the variable that has its URL."""
        with psycopg.connect(
            self.environment[variable], autocommit=True, connect_timeout=5
        ) as connection:
            yield connection

    def publish_concerts(self, seats: int) -> dict[int, list[int]]:
        """Put so many seats on sale, or some more; return their ids by performance."""
        wanted = -(-seats // (SECTION_ROWS * ROW_SEATS))
        url = next(iter(self.services.values()))
        found: dict[int, list[int]] = {}
        while wanted > 0:
            performances = min(wanted, PERFORMANCES_PER_CONCERT)
            wanted -= performances
            concert = self._publish(url, performances)
            for performance in concert["performances"]:
                number = performance["performance_id"]
                plan: Any = get_json(f"{url}/api/performances/{number}/seats")
                found[number] = [seat["seat_id"] for seat in plan["seats"]]
        return found

    def _publish(self, url: str, performances: int) -> dict[str, Any]:
        noon = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
        rows = [{"row": str(row), "seats": ROW_SEATS} for row in range(1, SECTION_ROWS + 1)]
        concert = {
            "title": "The evening on which everything breaks",
            "venue": "Town hall",
            "time_zone": "Europe/Berlin",
            "currency": "EUR",
            "performances": [
                {
                    "starts_at": (noon + timedelta(days=30 + number)).isoformat(),
                    "sales_open_at": (noon - timedelta(days=2)).isoformat(),
                    "sales_close_at": (noon + timedelta(days=29 + number)).isoformat(),
                    "sections": [{"section": "Stalls", "price": 5000, "rows": rows}],
                }
                for number in range(performances)
            ],
        }
        token = self.environment["RESERVATION_ADMIN_TOKEN"]
        request = urllib.request.Request(  # noqa: S310 - our own service
            f"{url}/api/concerts",
            json.dumps(concert).encode(),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found

    def wait_well(self, timeout_s: float) -> None:
        """Wait until every part runs, every service is ready and every broker has joined.

        Raises:
            TimeoutError: in vain.
        """
        wait_until(
            lambda: all(part.alive for part in self.supervisor.parts.values()),
            timeout_s,
            "every part to run",
        )
        wait_until(lambda: all(map(ready, self.services.values())), timeout_s, "the services")
        self.kafka.wait_ready()

    def end(self) -> dict[str, int]:
        """End our programs by SIGTERM; return the exit codes."""
        return {name: self.part(name).end() for name in self._processes}

    def logs(self) -> list[Path]:
        """The logs of all parts."""
        return sorted(self.run.path.glob("*.log"))


def ready(url: str) -> bool:
    """Whether a service says that it is ready."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
