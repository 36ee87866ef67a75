"""The whole product on one stack under load, its parts killed or exchanged, then audited.

A part may come from another source tree: an older version beside the present one.
"""

import json
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psycopg

from devstack.application import get_json
from devstack.audit import audit
from devstack.customers import Customers, Told
from devstack.demo import as_they_ended, seats_on_sale
from devstack.processes import DevstackError, Process, succeed, wait_until
from devstack.stack import COMMAND_TIMEOUT_S, Stack
from devstack.state import REPOSITORY, free_port

READY_TIMEOUT_S = 40.0
STOP_TIMEOUT_S = 15.0
LOADED_TIMEOUT_S = 90.0
BOOKING_TIMEOUT_S = 240.0
CLIENTS = 6
IMPATIENT_HOLD_S = "2"
WANTED = "SELECT coalesce(sum(version), 0)::bigint FROM reservations"
EXPIRED = "SELECT count(*) FROM reservations WHERE status = 'expired'"
FACTS = "SELECT count(*) FROM analytics.fct_reservation_events"


@dataclass(frozen=True)
class Findings:
    """What the audit of a scene has found; `differences` is empty when all places agree."""

    reservations: int
    events: int
    topic_records: int
    lost: int
    doubled_in_topic: int
    doubled_in_tables: int
    reordered: int
    differences: list[str]


class Scene:
    """Starts parts on a started stack, kills and exchanges them; ends them with the `with` block.

    Args:
        environment: variables for every part, on top of the stack's.
    """

    def __init__(self, stack: Stack, environment: Mapping[str, str] | None = None) -> None:
        self.stack = stack
        self.parts: dict[str, Process] = {}
        self._environment = dict(environment or {})
        self._cleanup = ExitStack()
        self._crowds: list[Crowd] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    # ---- parts

    def begin(
        self,
        name: str,
        package: str,
        *arguments: str,
        tree: Path = REPOSITORY,
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Start `python -m PACKAGE ARGUMENTS…` from a source tree; its log is named after it."""
        process = Process(
            [sys.executable, "-m", package, *arguments],
            name=name,
            log=self.stack.run.path / f"{name}.log",
            env=self.stack.child_environment() | self._environment | dict(env or {}),
            cwd=tree,
            keep_fds=[self.stack.run.lock_fd],
        )
        self.parts[name] = process
        self._cleanup.callback(process.stop, STOP_TIMEOUT_S)
        return process

    def relay(self, name: str, tree: Path = REPOSITORY) -> Process:
        """Start a relay; it may have to stand by."""
        return self.begin(name, "outbox_relay", "run", tree=tree)

    def worker(self, name: str, tree: Path = REPOSITORY) -> Process:
        """Start a worker."""
        return self.begin(name, "data_platform", "run", tree=tree)

    def sweeper(self, name: str, tree: Path = REPOSITORY) -> Process:
        """Start what ends lapsed holds."""
        return self.begin(name, "reservation_service", "expire-holds", "--every", "1", tree=tree)

    def service(
        self, name: str, tree: Path = REPOSITORY, env: Mapping[str, str] | None = None
    ) -> str:
        """Start a service, and return its base URL once it answers."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        arguments = ("serve", "--port", str(port), "--workers", "1")
        process = self.begin(name, "reservation_service", *arguments, tree=tree, env=env)
        process.wait_ready(lambda: _answers(f"{url}/readyz"), READY_TIMEOUT_S)
        return url

    def services(self, name: str, tree: Path = REPOSITORY) -> tuple[str, str]:
        """Start a service, and one whose holds run out soon; return both base URLs."""
        impatient = {"RESERVATION_HOLD_SECONDS": IMPATIENT_HOLD_S}
        return self.service(name, tree), self.service(f"{name}-impatient", tree, impatient)

    def command(self, package: str, *arguments: str, tree: Path = REPOSITORY) -> str:
        """Run a command to its end, and return what it wrote.

        Raises:
            DevstackError: it failed.
        """
        name = f"{package}-{arguments[0]}-{len(self.parts)}"
        process = self.begin(name, package, *arguments, tree=tree)
        succeed(process, COMMAND_TIMEOUT_S)
        return process.log.read_text("utf-8")

    def await_said(self, process: Process, event: str, times: int = 1) -> None:
        """Wait until a part has logged an event so often."""
        process.wait_ready(lambda: said(process, event) >= times, READY_TIMEOUT_S)

    # ---- load

    def book(self, urls: tuple[str, str], reservations: int, seed: int = 1) -> "Crowd":
        """Let customers book at these services from now on."""
        crowd = Crowd(urls, reservations, self.stack.environment["RESERVATION_SECRET_KEY"], seed)
        self._crowds.append(crowd)
        self._cleanup.callback(crowd.join)
        return crowd

    # ---- audit

    def audit(self) -> Findings:
        """Wait until all that was booked is in the tables, and compare every place."""
        told = Told()
        for crowd in self._crowds:
            crowd.join()
            told.status_by_reservation |= crowd.told.status_by_reservation
            told.forgotten |= crowd.told.forgotten
        environment = self.stack.environment
        late = self._await_tables(len(told.forgotten))
        found = audit(as_they_ended(told), environment)
        with psycopg.connect(environment["ANALYST_DATABASE_URL"]) as analyst:
            rows = (analyst.execute(FACTS).fetchone() or (0,))[0]
        return Findings(
            reservations=len(found.told),
            events=len(found.outbox),
            topic_records=found.topic_records,
            lost=len(found.outbox - found.facts),
            doubled_in_topic=found.topic_records - len(found.topic),
            doubled_in_tables=rows - len(found.facts),
            reordered=found.out_of_order,
            differences=[*late, *found.differences()],
        )

    def _await_tables(self, forgotten: int) -> list[str]:
        environment = self.stack.environment
        with (
            psycopg.connect(environment["RESERVATION_OWNER_DATABASE_URL"], autocommit=True) as ours,
            psycopg.connect(environment["ANALYST_DATABASE_URL"], autocommit=True) as theirs,
        ):

            def arrived() -> bool:
                return (
                    ours.execute(EXPIRED).fetchone() == (forgotten,)
                    and theirs.execute(FACTS).fetchone() == ours.execute(WANTED).fetchone()
                )

            try:
                wait_until(arrived, LOADED_TIMEOUT_S, "every event to be loaded")
            except TimeoutError as error:  # the audit tells what is missing where
                return [str(error)]
        return []


class Crowd:
    """Customers who book in a thread of their own."""

    def __init__(self, urls: tuple[str, str], reservations: int, key: str, seed: int) -> None:
        self._customers = Customers(
            *urls,
            secret_key=key,
            seats_by_performance=seats_on_sale(urls[0]),
            on_booked=lambda _: None,
            seed=seed,
        )
        self.told = self._customers.told
        self._wanted = reservations
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._book, daemon=True)
        self._thread.start()

    def _book(self) -> None:
        try:
            self._customers.book(self._wanted, CLIENTS)
        except Exception as error:  # noqa: BLE001 - raised by join, in the caller's thread
            self._failure = error

    def await_booked(self, part: float) -> None:
        """Wait until that part of the reservations is made.

        Raises:
            DevstackError: a customer saw what no customer should see.
        """

        def made() -> bool:
            if self._failure:
                raise DevstackError(f"a customer gave up: {self._failure}")
            return len(self.told.status_by_reservation) >= self._wanted * part

        wait_until(made, BOOKING_TIMEOUT_S, f"{part:.0%} of the reservations")

    def join(self) -> None:
        """Wait until all have finished.

        Raises:
            DevstackError: a customer saw what no customer should see.
        """
        self._thread.join(BOOKING_TIMEOUT_S)
        if self._failure or self._thread.is_alive():
            raise DevstackError(f"a customer gave up: {self._failure or 'no end'}")


def said(process: Process, event: str) -> int:
    """How often a part has logged an event."""
    lines = process.log.read_text("utf-8").splitlines()
    return sum(json.loads(line).get("event") == event for line in lines if line[:1] == "{")


def _answers(url: str) -> bool:
    try:
        get_json(url)
    except OSError:
        return False
    return True
