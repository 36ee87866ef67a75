"""Bring `docker-compose.yml` up, book, kill a broker, the leading relay and a worker under load.

`make compose-test`: nothing that a customer was told may be missing in the analysts' tables, and
`data-platform reconcile` has to agree. Needs a Docker engine with compose 2. Everything is in a
project of its own, on a free port, and is removed at the end with its volumes.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from devstack.application import get_json
from devstack.customers import Customers
from devstack.processes import DevstackError, wait_until
from devstack.state import free_port

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
PROJECT = "concert-reservation-test"
BUILD_TIMEOUT_S = 1_800.0
COMMAND_TIMEOUT_S = 120.0
HEALTHY_TIMEOUT_S = 120.0
ARRIVAL_TIMEOUT_S = 60.0
# What `docker kill` does to who is idle proves little: bookings go on at this rate throughout.
BOOKINGS_PER_S = 15.0
THREADS = 6
MARGIN = 50
ASK_INTERVAL_S = 0.5
STOP_LIMIT_S = "10"
LOADED = "SELECT reservation_id || ' ' || status FROM analytics.fct_reservations"
PROGRAMS = ("service", "sweeper", "relay", "worker")


class Compose:
    """`docker compose` for a project of our own."""

    def __init__(self) -> None:
        self.port = free_port()
        self._environment = os.environ | {"PORT": str(self.port)}

    def __call__(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a command; return what it printed.

        Raises:
            DevstackError: it failed; with the end of what it said.
        """
        return run("docker", "compose", "--project-name", PROJECT, *arguments,
                   timeout_s=timeout_s, environment=self._environment)  # fmt: skip

    def containers(self, service: str) -> list[str]:
        """Ids of a service's containers, ended ones too."""
        return sorted(self("ps", "--all", "--quiet", "--no-trunc", service).split())

    def in_(self, service: str, *command: str) -> str:
        """What a command prints inside the first container of a service."""
        return self("exec", "--no-TTY", service, *command)

    def loaded(self) -> dict[str, str]:
        """The analysts' reservations: id → status."""
        rows = self.in_("analytics-db", "psql", "-U", "postgres", "-d", "analytics", "-Atc", LOADED)
        return dict(row.split(" ") for row in rows.splitlines())

    def all_healthy(self, *services: str) -> bool:
        """Whether every container of these services is."""
        return all(is_healthy(one) for service in services for one in self.containers(service))


def run(*command: str, timeout_s: float, environment: dict[str, str] | None = None) -> str:
    """Run a program; return what it printed.

    Raises:
        DevstackError: it failed or took too long; with the end of what it said.
    """
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DevstackError(str(error)) from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-2_000:]
        raise DevstackError(f"{' '.join(command)}: exit code {done.returncode}\n{said}")
    return done.stdout


def patiently(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """As `wait_until`, asking seldom: each question to the engine is a process."""

    def asked() -> T:
        answer = condition()
        if not answer:
            time.sleep(ASK_INTERVAL_S)
        return answer

    return wait_until(asked, timeout_s, what)


def state_of(container: str) -> dict[str, Any]:
    """The engine's view of a container: ExitCode, Health, OOMKilled …"""
    text = run("docker", "inspect", "-f", "{{json .State}}", container, timeout_s=COMMAND_TIMEOUT_S)
    return dict(json.loads(text))


def is_healthy(container: str) -> bool:
    """Whether its health check says so."""
    return bool(state_of(container)["Health"]["Status"] == "healthy")


def leading_relay(compose: Compose) -> str:
    """The container whose relay leads: its name on the network begins its id."""

    def leader() -> str:
        status = json.loads(compose.in_("relay", "outbox-relay", "status", "--json"))
        host = str(status["leader"] or "").partition(":")[0]
        return next(
            (one for one in compose.containers("relay") if host and one.startswith(host)), ""
        )

    return patiently(leader, ARRIVAL_TIMEOUT_S, "a leading relay")


class Load:
    """Customers who book at a steady rate, until told to stop and `wanted` bookings were made."""

    def __init__(self, customers: Customers, wanted: int) -> None:
        self.customers = customers
        self._wanted = wanted
        self._enough = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._live, daemon=True)

    def _live(self) -> None:
        try:
            while not self._enough.is_set() or self.count() < self._wanted:
                self.customers.book(self.count() + MARGIN, THREADS)
        except BaseException as error:  # noqa: BLE001 - raised in `count` and `finish`
            self._failure = error

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def count(self) -> int:
        """Bookings so far.

        Raises:
            DevstackError: a customer saw what no customer should see.
        """
        if self._failure:
            raise DevstackError(f"a customer: {self._failure!r}") from self._failure
        return len(self.customers.told.status_by_reservation)

    def wait_for(self, more: int) -> None:
        """Wait until `more` bookings were made."""
        goal = self.count() + more
        patiently(lambda: self.count() >= goal, ARRIVAL_TIMEOUT_S, f"{more} more bookings")

    def finish(self) -> dict[str, str]:
        """End it; return what customers were told, by reservation."""
        self._enough.set()
        self._thread.join()
        self.count()
        return dict(self.customers.told.status_by_reservation)


def at_a_steady_rate() -> Callable[[str], None]:
    """What slows customers down to BOOKINGS_PER_S in all: each waits for its turn."""
    turn, lock = time.monotonic(), threading.Lock()

    def wait(_reservation: str) -> None:
        nonlocal turn
        with lock:
            turn = max(turn, time.monotonic() - 1) + 1 / BOOKINGS_PER_S
            ahead_s = turn - time.monotonic()
        time.sleep(max(ahead_s, 0))

    return wait


def kill_and_watch(compose: Compose, load: Load, what: str, container: str) -> None:
    """`docker kill`; bookings go on and reach the tables without it; then it comes back."""
    run("docker", "kill", container, timeout_s=COMMAND_TIMEOUT_S)
    began_s, at = time.monotonic(), load.count()
    load.wait_for(MARGIN)
    with load.customers.told.lock:
        later = set(list(load.customers.told.status_by_reservation)[at : at + MARGIN])
    patiently(lambda: later <= compose.loaded().keys(), ARRIVAL_TIMEOUT_S, f"events without {what}")
    click.echo(
        f"  killed {what} after {at} bookings; the next {MARGIN} were booked and in the tables "
        f"{time.monotonic() - began_s:.1f} s later"
    )
    run("docker", "start", container, timeout_s=COMMAND_TIMEOUT_S)
    patiently(lambda: is_healthy(container), HEALTHY_TIMEOUT_S, f"{what} to be healthy again")


def reconciled(compose: Compose) -> str:
    """What `reconcile` says, once nothing is on its way any more; it fails on any difference."""

    def report() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            compose("run", "--rm", "--no-TTY", "reconcile", "data-platform", "reconcile", "--json")
        )
        return {} if found["in_flight"] else found

    found = patiently(report, ARRIVAL_TIMEOUT_S, "nothing to be on its way")
    return ", ".join(f"{found[name]} {name}" for name in ("found", "unexamined", "in_flight"))


def stop_within_the_limit(compose: Compose) -> str:
    """SIGTERM to every program at once: each ends by itself, with code 0.

    Raises:
        DevstackError: one didn't, or took longer than STOP_LIMIT_S and was killed.
    """
    containers = {one: service for service in PROGRAMS for one in compose.containers(service)}
    began_s = time.monotonic()
    run("docker", "stop", "--time", STOP_LIMIT_S, *containers, timeout_s=COMMAND_TIMEOUT_S)
    taken_s = time.monotonic() - began_s
    codes = {
        f"{service} {one[:12]}": state_of(one)["ExitCode"] for one, service in containers.items()
    }
    if any(codes.values()):
        raise DevstackError(f"after SIGTERM programs ended with other codes than 0: {codes}")
    return f"{len(codes)} programs ended with code 0 within {taken_s:.1f} s"


def seats_on_sale(base_url: str) -> dict[int, list[int]]:
    """Available seats by performance, of the biggest concert."""
    concerts: Any = get_json(f"{base_url}/api/concerts")
    found = {}
    for performance in max(concerts["items"], key=capacity)["performances"]:
        number = performance["performance_id"]
        seats: Any = get_json(f"{base_url}/api/performances/{number}/seats")
        found[number] = [one["seat_id"] for one in seats["seats"] if one["status"] == "available"]
    return found


def capacity(concert: dict[str, Any]) -> int:
    """How many seats a concert has in all."""
    return sum(one["capacity"] for one in concert["performances"])


@contextmanager
def removed_afterwards(compose: Compose, *, keep: bool) -> Iterator[None]:
    """Show the logs of what went wrong, and leave nothing behind but the images."""
    try:
        yield
    except (DevstackError, TimeoutError):
        click.echo(compose("logs", "--no-color", "--tail", "15"), err=True)
        raise
    finally:
        if not keep:
            compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "15")


def prove(compose: Compose, bookings: int) -> None:
    """The whole scene."""
    began_s = time.monotonic()
    compose("up", "--build", "--detach", timeout_s=BUILD_TIMEOUT_S)
    programs = ("service", "relay", "worker")
    patiently(lambda: compose.all_healthy(*programs), HEALTHY_TIMEOUT_S, "programs to be healthy")
    click.echo(f"  up in {time.monotonic() - began_s:.1f} s, images built")
    base_url = f"http://127.0.0.1:{compose.port}"
    customers = Customers(
        base_url,
        base_url,
        secret_key=compose.in_("service", "cat", "/run/secrets/service/secret-key"),
        seats_by_performance=seats_on_sale(base_url),
        on_booked=at_a_steady_rate(),
    )
    load = Load(customers, bookings)
    load.start()
    victims: dict[str, Callable[[], str]] = {
        "a broker": lambda: compose.containers("kafka-2")[0],
        "the leading relay": lambda: leading_relay(compose),
        "a worker": lambda: compose.containers("worker")[0],
    }
    for what, find in victims.items():
        load.wait_for(MARGIN)
        kill_and_watch(compose, load, what, find())
    told = load.finish()
    patiently(lambda: compose.loaded() == told, ARRIVAL_TIMEOUT_S, "all bookings in the tables")
    click.echo(f"  {len(told)} reservations as customers were told: {dict(Counter(told.values()))}")
    click.echo(f"  reconcile: {reconciled(compose)}")
    click.echo(f"  SIGTERM: {stop_within_the_limit(compose)}")


@click.command()
@click.option("--bookings", type=click.IntRange(100, 4_000), default=1_000, show_default=True)
@click.option("--keep", is_flag=True, help="Leave everything there afterwards.")
def main(bookings: int, *, keep: bool) -> None:
    """Prove docker-compose.yml."""
    try:
        run("docker", "compose", "version", timeout_s=COMMAND_TIMEOUT_S)
        run("docker", "info", timeout_s=COMMAND_TIMEOUT_S)
    except DevstackError as error:
        click.echo(f"compose: needs a Docker engine and compose 2: {str(error)[-200:]}", err=True)
        sys.exit(2)
    compose = Compose()
    try:
        with removed_afterwards(compose, keep=keep):
            prove(compose, bookings)
    except (DevstackError, TimeoutError) as error:
        click.echo(f"compose: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
