"""The matrix of servers: which cells are run, and how one is run.

Every pair of values of two columns stands in some cell, so that a fault that needs two things
together is met; a fault that needs three may not be.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from devstack.processes import DevstackError
from devstack.stack import Stack
from devstack.steps import Steps
from tests.compatibility.scene import Scene, said

RESERVATIONS = 1_500


@dataclass(frozen=True)
class Cell:
    """One combination of servers and of ways to run our parts."""

    postgres: str
    kafka: str
    brokers: int
    delivery: str
    workers: int

    @property
    def environment(self) -> dict[str, str]:
        """What devstack takes for it."""
        version, _, zookeeper = self.kafka.partition(" ")
        return {
            "DEVSTACK_CONTAINERS": "0",
            "DEVSTACK_POSTGRES": self.postgres,
            "DEVSTACK_KAFKA": version,
            "DEVSTACK_ZOOKEEPER": "1" if zookeeper == "ZooKeeper" else "0",
        }

    @property
    def protocol(self) -> str:
        """The group protocol that its brokers know: KIP-848's is general from 4.0 on."""
        return "consumer" if self.kafka.startswith("4.") else "classic"


CELLS = (
    Cell("18", "4.3.0 KRaft", 3, "exactly_once", 2),
    Cell("16", "4.3.0 KRaft", 1, "at_least_once", 1),
    Cell("15", "4.3.0 KRaft", 3, "at_least_once", 2),
    Cell("18", "3.9.2 KRaft", 1, "at_least_once", 2),
    Cell("16", "3.9.2 KRaft", 3, "exactly_once", 1),
    Cell("15", "3.9.2 KRaft", 1, "exactly_once", 1),
    Cell("18", "3.9.2 ZooKeeper", 3, "at_least_once", 1),
    Cell("16", "3.9.2 ZooKeeper", 1, "exactly_once", 2),
    Cell("15", "3.9.2 ZooKeeper", 1, "exactly_once", 1),
)


def run_cell(cell: Cell, steps: Steps, reservations: int = RESERVATIONS) -> dict[str, Any]:
    """Book while a relay, a broker and a worker are killed; return the row of the table.

    Raises:
        DevstackError: a part failed, or didn't do what this cell is for.
        TimeoutError: it took too long.
    """
    began_s = time.monotonic()
    with setting(cell.environment), Stack(cell.brokers, steps) as stack:
        stack.start()
        with Scene(stack, {"OUTBOX_RELAY_DELIVERY": cell.delivery}) as scene:
            scene.command("reservation_service", "seed-demo")
            _book_and_kill(scene, cell, reservations)
            findings = scene.audit()
            _check_postgres(stack, cell)
            protocol = _protocol(scene)
        return {
            **asdict(cell),
            "postgres": stack.reservations.version.removeprefix("PostgreSQL "),
            "protocol": protocol,
            **asdict(findings),
            "seconds": round(time.monotonic() - began_s),
        }


def problems(cell: Cell, row: Mapping[str, Any]) -> list[str]:
    """What speaks against a cell's result; empty when it is as it must be."""
    found = list(row["differences"])
    found += [
        f"{row[name]} {name}" for name in ("lost", "doubled_in_tables", "reordered") if row[name]
    ]
    if cell.delivery == "exactly_once" and row["doubled_in_topic"]:
        found.append(f"{row['doubled_in_topic']} records twice in the topic")
    if row["protocol"] != cell.protocol:
        found.append(f"the workers spoke the {row['protocol']} protocol, not {cell.protocol}")
    if not row["events"]:
        found.append("nothing was booked")
    return found


@contextmanager
def setting(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of our own environment, for devstack."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _book_and_kill(scene: Scene, cell: Cell, reservations: int) -> None:
    scene.sweeper("sweeper")
    relay = scene.relay("relay-1")
    scene.await_said(relay, "leading")
    standby = scene.relay("relay-2")
    workers = [scene.worker(f"worker-{number + 1}") for number in range(cell.workers)]
    for worker in workers:
        scene.await_said(worker, "partitions_placed")
    crowd = scene.book(scene.services("service"), reservations)
    crowd.await_booked(0.2)
    relay.kill()
    crowd.await_booked(0.4)
    broker = scene.stack.kafka.leader_of("concert-reservation")
    broker.kill()
    crowd.await_booked(0.6)
    broker.start()
    crowd.await_booked(0.8)
    workers[0].kill()
    scene.await_said(scene.worker("worker-again"), "partitions_placed")
    scene.await_said(standby, "leading")


def _protocol(scene: Scene) -> str:
    workers = [part for name, part in scene.parts.items() if name.startswith("worker")]
    fell_back = {said(worker, "classic_group") > 0 for worker in workers}
    return "mixed" if len(fell_back) > 1 else "classic" if fell_back.pop() else "consumer"


def _check_postgres(stack: Stack, cell: Cell) -> None:
    if not stack.reservations.version.startswith(f"PostgreSQL {cell.postgres}."):
        raise DevstackError(f"{stack.reservations.version} is not {cell.postgres}")
