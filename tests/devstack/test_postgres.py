"""Postgres under every user and in every place, and what a killed one leaves behind."""

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from devstack.postgres import (
    UNPRIVILEGED_USER,
    Installation,
    PostgresServer,
    StopMode,
    _within_reach,
    find_installation,
)
from devstack.processes import ConfigurationError, descendants, run
from devstack.state import REPOSITORY, Run, free_port
from tests.conftest import MakePostgresServer
from tests.require import require
from tests.waiting import wait_until

START = """
import os, sys
from devstack.postgres import PostgresServer
from devstack.state import Run
with Run() as run:
    server = PostgresServer(run, "postgres")
    server.start()
    print(os.geteuid(), server._process.pid, flush=True)
    sys.stdin.read()
    server.close()
"""

pytestmark = pytest.mark.needs_postgres


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEVSTACK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DEVSTACK_CONTAINERS", "0")
    return tmp_path / "home"


def major_version(server: PostgresServer) -> int:
    with psycopg.connect(server.admin_url) as connection:
        return connection.info.server_version // 10_000


def owners_of(pids: list[int]) -> set[int]:
    """Whom these processes belong to; Postgres's background workers come and go meanwhile."""
    owners = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            owners.add(Path(f"/proc/{pid}").stat().st_uid)
    return owners


def test_root_may_start_it_below_a_folder_that_only_root_can_enter(tmp_path: Path) -> None:
    require(os.geteuid() == 0, "root")
    tmp_path.chmod(0o700)
    with Run() as run, contextlib.closing(PostgresServer(run, "postgres")) as server:
        server.start()
        assert server._process
        family = descendants(server._process.pid)  # type: ignore[attr-defined] # a local one
        assert owners_of(family) == {pwd.getpwnam("nobody").pw_uid}


def test_a_plain_user_may_start_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START]
    if os.geteuid() == 0:
        require(shutil.which("setpriv"), "setpriv from util-linux")
        # The capability only lets that user read a checkout below a private folder.
        caps = ["--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override"]
        ids = ["--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        command = ["setpriv", *ids, *caps, "--", *command]
    with (tmp_path / "log").open("wb") as log:
        starter = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        output, _ = starter.communicate(timeout=60)
    assert starter.returncode == 0, (tmp_path / "log").read_text(encoding="utf-8")
    assert int(output.split()[0]) != 0


@pytest.mark.parametrize(("choice", "major"), [("16", 16), ("18", 18), ("", 18)])
def test_a_variable_chooses_the_version(
    monkeypatch: pytest.MonkeyPatch,
    make_postgres_server: MakePostgresServer,
    choice: str,
    major: int,
) -> None:
    monkeypatch.setenv("DEVSTACK_POSTGRES", choice)
    assert major_version(make_postgres_server()) == major


def test_a_variable_chooses_what_the_system_has(
    monkeypatch: pytest.MonkeyPatch, make_postgres_server: MakePostgresServer
) -> None:
    monkeypatch.setenv("DEVSTACK_POSTGRES", "system")
    try:
        installation = find_installation()
    except ConfigurationError:
        require(available=False, what="an installed PostgreSQL 15 or newer")
        return
    server = make_postgres_server()
    assert str(major_version(server)) == installation.version.split(".")[0]


def test_an_unknown_choice_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"DEVSTACK_POSTGRES: expected 18, 16, 15 or"):
        find_installation("9")


def test_an_owner_may_make_roles_but_is_no_superuser(
    make_postgres_server: MakePostgresServer,
) -> None:
    server = make_postgres_server()
    server.create_database("app", "app_owner")
    url = server.url("app", "app_owner", server.give_password("app_owner"))
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE mine ()")
        connection.execute("CREATE ROLE app_service")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("COPY mine TO PROGRAM 'cat'")


def test_nobody_gets_in_without_the_password_and_it_is_not_shown(
    make_postgres_server: MakePostgresServer,
) -> None:
    server = make_postgres_server()
    password = re.search(":([^:@/]+)@", server.admin_url)
    assert password
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(server.url("postgres", "postgres", "guess"))
    assert password[1] not in repr(server)
    assert password[1] not in server.log.read_text(encoding="utf-8")
    assert not list(server.log.parent.rglob("password"))


def test_each_server_has_an_identity_of_its_own(make_postgres_server: MakePostgresServer) -> None:
    identities = set()
    for server in (make_postgres_server(), make_postgres_server()):
        with psycopg.connect(server.admin_url) as connection:
            row = connection.execute("SELECT system_identifier FROM pg_control_system()").fetchone()
            identities.add(row)
    assert len(identities) == 2


def test_a_port_that_somebody_else_took_is_changed_at_the_first_start(
    monkeypatch: pytest.MonkeyPatch, make_postgres_server: MakePostgresServer
) -> None:
    taken = make_postgres_server().port
    choices = iter([taken])
    monkeypatch.setattr("devstack.postgres.free_port", lambda: next(choices, None) or free_port())
    server = make_postgres_server()
    assert server.port != taken
    assert major_version(server) >= 15


def test_nothing_is_left_of_it_when_its_starter_is_killed(own_home: Path, tmp_path: Path) -> None:
    segments = Path("/proc/sysvipc/shm")
    with (tmp_path / "log").open("wb") as log:
        starter = subprocess.Popen(
            [sys.executable, "-c", START],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        with starter:
            assert starter.stdout
            family = descendants(int(starter.stdout.readline().split()[1]))
            assert len(family) > 3
            segment = (next(own_home.glob("run-*/postgres/data/postmaster.pid"))).read_text(
                encoding="ascii"
            ).splitlines()[6].split()[1]  # fmt: skip
            starter.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), 15, "their end")
    known = [line.split()[1] for line in segments.read_text(encoding="ascii").splitlines()[1:]]
    assert segment not in known

    def only_ours_is_left() -> bool:
        with Run() as run:
            return list(own_home.glob("run-*")) == [run.path]

    # The leash, which is no descendant, holds the folder's lock for a moment longer.
    wait_until(only_ours_is_left, 15, "the killed one's folder to be removed")


def test_a_killed_server_that_is_not_started_again_gives_its_shared_memory_back() -> None:
    with Run() as run:
        server = PostgresServer(run, "postgres")
        server.start()
        pid_file = run.path / "postgres" / "data" / "postmaster.pid"
        segment = pid_file.read_text(encoding="ascii").splitlines()[6].split()[1]
        server.kill()
        server.close()
    lines = Path("/proc/sysvipc/shm").read_text(encoding="ascii").splitlines()[1:]
    assert segment not in [line.split()[1] for line in lines]


def test_a_paused_server_answers_again_after_its_resumption(
    make_postgres_server: MakePostgresServer,
) -> None:
    server = make_postgres_server()
    with psycopg.connect(server.admin_url) as connection:
        server.pause()
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            psycopg.connect(server.admin_url, connect_timeout=2)
        server.resume()
        assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_it_stops_in_each_mode_and_starts_again(
    make_postgres_server: MakePostgresServer, mode: StopMode
) -> None:
    server = make_postgres_server()
    server.stop(mode)
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.admin_url)
    server.start()
    assert major_version(server) >= 15


def test_programs_below_a_folder_of_root_alone_can_be_run_by_another_user(tmp_path: Path) -> None:
    require(os.geteuid() == 0, "root")
    wheel = find_installation("18").programs.parents[1]
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for part in (wheel, wheel.with_name(f"{wheel.name}.libs")):
        shutil.copytree(part, closed / part.name, symlinks=True)
    programs = closed / wheel.name / "pginstall18" / "bin"
    nobody = pwd.getpwnam(UNPRIVILEGED_USER).pw_uid
    found = _within_reach(Installation(programs, "18.0"), nobody)
    assert found != programs
    # initdb finds the server beside it only where access() lets it.
    run(
        [
            *("setpriv", f"--reuid={nobody}", "--clear-groups", "--"),
            *(found / "initdb", "--version"),
        ],
        log=tmp_path / "log",
        timeout_s=20,
    )
    assert _within_reach(Installation(programs, "18.0"), nobody) == found
