"""`python -m devstack stack` as a person or a script meets it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from confluent_kafka.admin import AdminClient

from devstack.processes import Process, descendants
from devstack.state import REPOSITORY
from tests.waiting import wait_until

NAMES = {
    "RESERVATION_OWNER_DATABASE_URL",
    "RESERVATION_DATABASE_URL",
    "OUTBOX_RELAY_DATABASE_URL",
    "ANALYTICS_OWNER_DATABASE_URL",
    "ANALYTICS_DATABASE_URL",
    "ANALYST_DATABASE_URL",
    "KAFKA_BOOTSTRAP_SERVERS",
    "RESERVATION_SECRET_KEY",
    "RESERVATION_ADMIN_TOKEN",
}
START_TIMEOUT_S = 90.0

StartStack = Callable[..., Process]


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "devstack", *arguments],
        cwd=REPOSITORY, env=os.environ | variables,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def start_stack(own_home: Path, tmp_path: Path) -> Iterator[StartStack]:
    """Starts a stack and returns when it has printed `ready`."""
    with ExitStack() as cleanup:

        def start(*, brokers: int = 1) -> Process:
            output = tmp_path / "output"
            output.unlink(missing_ok=True)
            stack = Process(
                [sys.executable, "-m", "devstack", "stack", "--brokers", str(brokers)],
                name="stack", log=tmp_path / "log", stdout=output, cwd=REPOSITORY,
                env=os.environ | {"DEVSTACK_HOME": str(own_home), "DEVSTACK_CONTAINERS": "0"},
            )  # fmt: skip
            cleanup.callback(stack.kill)
            stack.wait_ready(lambda: output.read_text("utf-8") == "ready\n", START_TIMEOUT_S)
            return stack

        yield start


def variables(home: Path) -> dict[str, str]:
    lines = (home / "env").read_text(encoding="ascii").splitlines()
    found = [re.fullmatch(r"export ([A-Z_]+)='([^']+)'", line) for line in lines]
    assert all(found), lines
    return {match[1]: match[2] for match in found if match}


def left(home: Path) -> set[str]:
    """What a stack has left in its folder."""
    return {entry.name for entry in home.iterdir()} - {"cache", "lock", "env.lock"}


@pytest.mark.needs_postgres
@pytest.mark.needs_kafka
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_variable_leads_somewhere_and_a_signal_leaves_nothing(
    start_stack: StartStack, own_home: Path, how: signal.Signals
) -> None:
    stack = start_stack()
    found = variables(own_home)
    assert set(found) == NAMES
    assert (own_home / "env").stat().st_mode & 0o777 == 0o600
    for name in NAMES:
        if name.endswith("_URL"):
            with psycopg.connect(found[name]) as connection:
                row = connection.execute(
                    "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
                ).fetchone()
                assert row == (False,), name
    with psycopg.connect(found["RESERVATION_OWNER_DATABASE_URL"]) as connection:
        assert connection.execute("SELECT count(*) FROM outbox").fetchone() == (0,)
    admin = AdminClient({"bootstrap.servers": found["KAFKA_BOOTSTRAP_SERVERS"]})
    topics = admin.list_topics(timeout=10).topics
    assert len(topics["concert-reservation"].partitions) == 6
    family = descendants(stack.pid)
    stack.send_signal(how)
    assert stack.wait(20) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert left(own_home) == set()


@pytest.mark.needs_postgres
@pytest.mark.needs_kafka
def test_three_brokers_hold_three_replicas_and_a_killed_stack_leaves_no_process(
    start_stack: StartStack, own_home: Path
) -> None:
    stack = start_stack(brokers=3)
    servers = variables(own_home)["KAFKA_BOOTSTRAP_SERVERS"]
    assert len(servers.split(",")) == 3
    admin = AdminClient({"bootstrap.servers": servers})
    partitions = admin.list_topics(timeout=10).topics["concert-reservation"].partitions
    assert {len(partition.replicas) for partition in partitions.values()} == {3}
    family = descendants(stack.pid)
    os.kill(stack.pid, signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 20, "their end")
    start_stack()
    assert set(variables(own_home)) == NAMES
    assert len(list(own_home.glob("run-*"))) == 1


@pytest.mark.needs_postgres
@pytest.mark.needs_kafka
def test_a_second_stack_in_the_same_folder_is_refused_and_the_first_goes_on(
    start_stack: StartStack, own_home: Path
) -> None:
    stack = start_stack()
    second = script("stack", DEVSTACK_HOME=str(own_home), DEVSTACK_CONTAINERS="0")
    assert second.returncode == 2
    assert "DEVSTACK_HOME" in second.stderr
    assert stack.alive
    assert set(variables(own_home)) == NAMES


@pytest.mark.parametrize(
    ("variable", "value"),
    [("DEVSTACK_POSTGRES", "9"), ("DEVSTACK_KAFKA", "new"), ("DEVSTACK_CONTAINERS", "yes")],
)
def test_a_wrong_variable_is_named_in_one_line(own_home: Path, variable: str, value: str) -> None:
    answer = script("stack", DEVSTACK_HOME=str(own_home), **{variable: value})
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.count("\n") == 1
    assert variable in answer.stderr
    assert left(own_home) == set()


def test_a_wrong_number_of_brokers_is_wrong_usage() -> None:
    assert script("stack", "--brokers", "2").returncode == 2
