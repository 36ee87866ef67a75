"""Fixtures on real parts: a Postgres server and a Kafka broker for the session, started when
the first test asks for them. Whether they are containers or local programs is decided in
`devstack.parts`; no test knows.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from devstack.kafka import KafkaCluster
from devstack.parts import new_kafka, new_postgres
from devstack.postgres import PostgresServer
from devstack.processes import ConfigurationError, DevstackError, Process
from devstack.state import Run
from devstack.steps import Steps
from tests.databases import (
    AnalyticsDatabase,
    ReservationDatabase,
    create_analytics_database,
    create_reservation_database,
)
from tests.require import Account, require

POSTGRES_FIXTURES = {"postgres_server", "make_postgres_server"}
KAFKA_FIXTURES = {"kafka", "make_kafka_cluster"}
PROCESS_STOP_TIMEOUT_S = 15.0

account = Account()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs servers by the fixtures it uses; the rest is the quick run."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & POSTGRES_FIXTURES:
            item.add_marker(pytest.mark.needs_postgres)
        if fixtures & KAFKA_FIXTURES:
            item.add_marker(pytest.mark.needs_kafka)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch Kafka before the first test: a download doesn't belong into a test's time limit."""
    needed = any(item.get_closest_marker("needs_kafka") for item in session.items)
    if needed and not session.config.option.collectonly:
        # What goes wrong here goes wrong again, and is told, where a test wants a broker.
        with suppress(DevstackError, TimeoutError), Run() as run, Steps() as steps:
            step = steps.begin("Kafka for the tests")
            new_kafka(run, "fetch", prefer_containers=True).fetch(step.note)
            step.done()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Take down what could not be run."""
    account.note(report)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that TESTS_REQUIRE_ALL=1 wanted whole."""
    if account.failed and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what this machine could not run."""
    terminalreporter.section("what this machine could not run")
    for line in account.lines():
        terminalreporter.line(line, red=account.failed)
    if account.failed:
        terminalreporter.line("TESTS_REQUIRE_ALL=1: that is a failure", red=True)


@pytest.fixture(scope="session")
def stack_run() -> Iterator[Run]:
    """The folder that the session's servers live in."""
    with Run() as run:
        yield run


class MakePostgresServer(Protocol):
    """Starts a Postgres server; `settings` are server settings like {"max_connections": "20"}."""

    def __call__(self, settings: Mapping[str, str] | None = None) -> PostgresServer: ...


class MakeKafkaCluster(Protocol):
    """Starts a Kafka cluster of 1 or 3 brokers; `settings` are broker settings."""

    def __call__(
        self, brokers: int = 3, settings: Mapping[str, str] | None = None
    ) -> KafkaCluster: ...


class UniqueTopic(Protocol):
    """Creates a topic on the session's broker and returns its name; leaders are elected."""

    def __call__(
        self, partitions: int = 1, config: Mapping[str, str] | None = None, prefix: str = "test"
    ) -> str: ...


class RunProcess(Protocol):
    """Starts `python -m PACKAGE ARGUMENTS…`; `env` is added to the environment.

    Standard error is in `process.log`; standard output goes there too unless `stdout` names a
    file. With `ready`, returns when that is true (bounded by `timeout_s`).
    """

    def __call__(
        self,
        package: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdout: Path | None = None,
        ready: Callable[[], bool] | None = None,
        timeout_s: float = 30.0,
    ) -> Process: ...


_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server(stack_run: Run) -> Iterator[PostgresServer]:
    """The session's Postgres server. Not to be crashed: see `make_postgres_server`."""
    with ExitStack() as cleanup:
        yield _started_postgres(stack_run, cleanup, None)


@pytest.fixture
def make_postgres_server(stack_run: Run) -> Iterator[MakePostgresServer]:
    """Private Postgres servers, which a test may stop, kill and pause; ended with the test."""
    with ExitStack() as cleanup:
        yield lambda settings=None: _started_postgres(stack_run, cleanup, settings)


@pytest.fixture(scope="session")
def kafka(stack_run: Run) -> Iterator[KafkaCluster]:
    """The session's Kafka, one broker. Not to be crashed: see `make_kafka_cluster`."""
    with ExitStack() as cleanup:
        yield _started_kafka(stack_run, cleanup, 1, None)


@pytest.fixture
def make_kafka_cluster(stack_run: Run) -> Iterator[MakeKafkaCluster]:
    """Private Kafka clusters whose brokers a test may stop, kill and pause; ended with the test."""
    with ExitStack() as cleanup:
        yield lambda brokers=3, settings=None: _started_kafka(stack_run, cleanup, brokers, settings)


@pytest.fixture
def unique_topic(kafka: KafkaCluster) -> UniqueTopic:
    """A factory of topics that no other test uses."""

    def create(
        partitions: int = 1, config: Mapping[str, str] | None = None, prefix: str = "test"
    ) -> str:
        name = f"{prefix}-{os.getpid()}-{next(_numbers)}"
        kafka.create_topic(name, partitions, config)
        return name

    return create


@pytest.fixture(scope="session")
def reservation_template(postgres_server: PostgresServer) -> ReservationDatabase:
    """The migrated reservations database that each test's own is copied from."""
    return create_reservation_database(postgres_server, "reservations_template")


@pytest.fixture(scope="session")
def analytics_template(postgres_server: PostgresServer) -> AnalyticsDatabase:
    """The migrated analytics database that each test's own is copied from."""
    return create_analytics_database(postgres_server, "analytics_template")


@pytest.fixture
def reservation_database(
    postgres_server: PostgresServer, reservation_template: ReservationDatabase
) -> Iterator[ReservationDatabase]:
    """A fresh migrated reservations database: `owner_url`, `service_url`, `relay_url`."""
    template, name = reservation_template, f"reservations_{next(_numbers)}"
    postgres_server.create_database(name, "reservation_owner", template.name)
    yield replace(
        template,
        name=name,
        owner_url=_with_database(template.owner_url, name),
        service_url=_with_database(template.service_url, name),
        relay_url=_with_database(template.relay_url, name),
    )
    postgres_server.drop_database(name)


@pytest.fixture
def analytics_database(
    postgres_server: PostgresServer, analytics_template: AnalyticsDatabase
) -> Iterator[AnalyticsDatabase]:
    """A fresh migrated analytics database: `owner_url`, `loader_url`, `analyst_url`."""
    template, name = analytics_template, f"analytics_{next(_numbers)}"
    postgres_server.create_database(name, "analytics_owner", template.name)
    yield replace(
        template,
        name=name,
        owner_url=_with_database(template.owner_url, name),
        loader_url=_with_database(template.loader_url, name),
        analyst_url=_with_database(template.analyst_url, name),
    )
    postgres_server.drop_database(name)


@pytest.fixture
def run_process(tmp_path: Path) -> Iterator[RunProcess]:
    """Starts our own programs as subprocesses with logs in `tmp_path`; ends them with the test."""
    with ExitStack() as cleanup:

        def start(
            package: str,
            *arguments: str,
            env: Mapping[str, str] | None = None,
            stdout: Path | None = None,
            ready: Callable[[], bool] | None = None,
            timeout_s: float = 30.0,
        ) -> Process:
            process = Process(
                [sys.executable, "-m", package, *arguments],
                name=" ".join([package, *arguments[:1]]),
                log=tmp_path / f"{package}-{next(_numbers)}.log",
                stdout=stdout,
                env=os.environ | dict(env or {}),
            )
            cleanup.callback(process.stop, PROCESS_STOP_TIMEOUT_S)
            # A paused program doesn't see SIGTERM.
            cleanup.callback(process.resume)
            if ready:
                process.wait_ready(ready, timeout_s)
            return process

        yield start


def _started_postgres(
    run: Run, cleanup: ExitStack, settings: Mapping[str, str] | None
) -> PostgresServer:
    server = new_postgres(run, f"postgres-{next(_numbers)}", settings, prefer_containers=True)
    cleanup.callback(server.close)
    _or_skip(server.start)
    return server


def _started_kafka(
    run: Run, cleanup: ExitStack, brokers: int, settings: Mapping[str, str] | None
) -> KafkaCluster:
    name = f"kafka-{next(_numbers)}"
    cluster = new_kafka(run, name, brokers, settings, prefer_containers=True)
    cleanup.callback(cluster.close)
    _or_skip(cluster.start)
    return cluster


def _or_skip(start: Callable[[], None]) -> None:
    """Start something; what this machine has no software for is skipped, and accounted for."""
    try:
        start()
    except ConfigurationError as error:
        require(available=False, what=str(error))


def _with_database(url: str, name: str) -> str:
    return f"{url.rpartition('/')[0]}/{name}"
