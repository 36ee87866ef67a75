"""The whole stack: two databases on two servers, Kafka, migrations, topics.

One thread does it all: programs are launched first and awaited afterwards, so they start side
by side, and a signal interrupts whatever we wait for.
"""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from devstack.parts import new_kafka, new_postgres
from devstack.postgres import PostgresServer
from devstack.processes import ConfigurationError, Process, succeed
from devstack.state import REPOSITORY, Run, home, try_lock
from devstack.steps import Steps

COMMAND_TIMEOUT_S = 120.0
# Ours for every child: a setting left in somebody's shell must not reach into the stack.
OWN_PREFIXES = ("RESERVATION_", "OUTBOX_RELAY_", "ANALYTICS_", "ANALYST_", "KAFKA_", "METRICS_PORT")


class Stack:
    """Everything that the service, the relay and the workers need, empty.

    `start` makes it; afterwards `environment` holds the variables of `.devstack/env`. The end of
    the `with` block ends every program and removes the run's folder.

    Args:
        brokers: 1 or 3.
        steps: told what goes on.
        tree: the source tree whose programs are run; another one for another version.
    """

    def __init__(self, brokers: int, steps: Steps, *, tree: Path = REPOSITORY) -> None:
        self._steps = steps
        self._tree = tree
        self.environment: dict[str, str] = {}
        with ExitStack() as cleanup:
            self.run = cleanup.enter_context(Run())
            self._make_servers(brokers, cleanup)
            self._cleanup = cleanup.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _make_servers(self, brokers: int, cleanup: ExitStack) -> None:
        """Make `reservations`, `analytics` and `kafka`, not yet started, for `cleanup` to end."""
        self.reservations = new_postgres(self.run, "reservations")
        self.analytics = new_postgres(self.run, "analytics")
        self.kafka = new_kafka(self.run, "kafka", brokers)
        for part in (self.reservations, self.analytics, self.kafka):
            cleanup.callback(part.close)

    def start(self) -> None:
        """Start and fill everything.

        Raises:
            ConfigurationError: something is missing on this machine or wrongly configured.
            DevstackError: a program failed; with the end of its log.
            TimeoutError: a program took too long.
        """
        kafka_step = self._steps.begin(self.kafka.version)
        self.kafka.prepare(kafka_step.note)
        postgres_step = self._steps.begin("two PostgreSQL servers")
        servers = (self.reservations, self.analytics)
        for server in servers:
            server.prepare()
            server.launch()
        self.kafka.launch()
        for server in servers:
            server.wait_ready()
        postgres_step.done(f"{self.reservations.version}, two servers")

        with self._steps.step("migrations"):
            self._migrate()
        self.kafka.wait_ready()
        brokers = len(self.kafka.brokers)
        kafka_step.done(f"{self.kafka.version}, {brokers} broker{'s' if brokers > 1 else ''}")
        with self._steps.step("topics"):
            arguments = ["topics", "--replication-factor", str(brokers)]
            succeed(self.program("outbox_relay", *arguments), COMMAND_TIMEOUT_S)

    def program(
        self,
        package: str,
        *arguments: str,
        name: str = "",
        env: Mapping[str, str] | None = None,
        keep_fds: Sequence[int] = (),
    ) -> Process:
        """Start `python -m PACKAGE ARGUMENTS…` on this stack; its log is in the run's folder.

        `env` is added to the stack's environment. The caller waits for it and ends it; it ends
        with our process at the latest.
        """
        name = name or "-".join([package, *arguments[:1]])
        return Process(
            [sys.executable, "-m", package, *arguments],
            name=name,
            log=self.run.path / f"{name}.log",
            env=self.child_environment() | dict(env or {}),
            cwd=self._tree,
            keep_fds=[self.run.lock_fd, *keep_fds],
        )

    def child_environment(self) -> dict[str, str]:
        """Our environment with the stack's variables, and no others of the project's."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(OWN_PREFIXES)
        }
        return inherited | self.environment

    def _migrate(self) -> None:
        """Create both databases with their owners, migrate them, let the roles in."""
        reservations, analytics = self.reservations, self.analytics
        reservations.create_database("reservations", "reservation_owner")
        analytics.create_database("analytics", "analytics_owner")
        self.environment |= {
            "RESERVATION_OWNER_DATABASE_URL": _role(
                reservations, "reservations", "reservation_owner"
            ),
            "ANALYTICS_OWNER_DATABASE_URL": _role(analytics, "analytics", "analytics_owner"),
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "RESERVATION_SECRET_KEY": secrets.token_urlsafe(48),
            "RESERVATION_ADMIN_TOKEN": secrets.token_urlsafe(24),
        }
        migrations = [
            self.program("reservation_service", "migrate"),
            self.program("data_platform", "migrate"),
        ]
        for migration in migrations:
            succeed(migration, COMMAND_TIMEOUT_S)
        self.environment |= {
            "RESERVATION_DATABASE_URL": _role(reservations, "reservations", "reservation_service"),
            "OUTBOX_RELAY_DATABASE_URL": _role(reservations, "reservations", "outbox_relay"),
            "ANALYTICS_DATABASE_URL": _role(analytics, "analytics", "data_platform"),
            "ANALYST_DATABASE_URL": _role(analytics, "analytics", "analyst"),
        }


class EnvironmentFile:
    """`.devstack/env`, of which there is one: the lock says whose. A context manager.

    Raises:
        ConfigurationError: another stack that runs has it.
    """

    def __init__(self) -> None:
        self.path = home() / "env"
        # Not handed on to the programs: they outlive a killed owner by a moment.
        self._lock_fd = os.open(home() / "env.lock", os.O_RDWR | os.O_CREAT, 0o600)
        if not try_lock(self._lock_fd):
            os.close(self._lock_fd)
            raise ConfigurationError(
                f"another stack runs and owns {self.path}: stop it, "
                "or set DEVSTACK_HOME to a folder of its own"
            )

    def __enter__(self) -> Self:
        # A killed stack's file would name servers that are gone.
        self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._lock_fd)

    def write(self, environment: Mapping[str, str]) -> Path:
        """Write all variables at once: the file is whole or not there, and only ours to read."""
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            for name, value in environment.items():
                assert "'" not in value  # noqa: S101 - we made the values
                file.write(f"export {name}='{value}'\n")
        unfinished.rename(self.path)
        return self.path


def _role(server: PostgresServer, database: str, role: str) -> str:
    """Let a role log in with a new password, and return its connection URL."""
    return server.url(database, role, server.give_password(role))
