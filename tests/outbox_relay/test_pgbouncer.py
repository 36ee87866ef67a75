"""Behind a real PgBouncer the relay refuses, in words; before Postgres itself never."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from devstack.processes import Process
from devstack.state import free_port, port_answers
from outbox_relay import leadership, pooler, sql
from tests.databases import ReservationDatabase
from tests.require import require

START_TIMEOUT_S = 10.0
PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
# It refuses root; the capability lets it read its settings in a folder that is root's alone.
AS_NOBODY = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override", "--pdeathsig=KILL"),
]


@dataclass(frozen=True)
class MakePgBouncer:
    """Starts PgBouncer before a database; returns the relay's URL through it."""

    folder: Path
    cleanup: ExitStack

    def __call__(self, database: ReservationDatabase, pool_mode: str, ignored: str) -> str:
        require(PROGRAM, "PgBouncer (package pgbouncer)")
        relay, port = urlsplit(database.relay_url), free_port()
        users = self.folder / "users"
        users.write_text(f'"{relay.username}" "{relay.password}"\n', encoding="utf-8")
        settings = self.folder / "pgbouncer.ini"
        settings.write_text(
            f"""[databases]
{database.name} = host=127.0.0.1 port={relay.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {users}
pool_mode = {pool_mode}
default_pool_size = 1
ignore_startup_parameters = {ignored}
""",
            encoding="utf-8",
        )
        prefix = AS_NOBODY if os.geteuid() == 0 else []
        bouncer = Process([*prefix, str(PROGRAM), settings], log=self.folder / "pgbouncer.log")
        self.cleanup.callback(bouncer.stop)
        bouncer.wait_ready(lambda: port_answers(port), START_TIMEOUT_S)
        return f"postgresql://{relay.username}@127.0.0.1:{port}/{database.name}"


@pytest.fixture
def make_pgbouncer(tmp_path: Path) -> Iterator[MakePgBouncer]:
    with ExitStack() as cleanup:
        yield MakePgBouncer(tmp_path, cleanup)


@pytest.mark.parametrize("pool_mode", ["transaction", "session"])
def test_a_pgbouncer_that_drops_the_session_s_settings_is_found(
    reservation_database: ReservationDatabase, make_pgbouncer: MakePgBouncer, pool_mode: str
) -> None:
    url = make_pgbouncer(reservation_database, pool_mode, "options,extra_float_digits")
    with psycopg.connect(url, autocommit=True, options=sql.SESSION_OPTIONS) as connection:
        # One server session serves all: its number alone would not give the pooler away.
        pids = {connection.execute("SELECT pg_backend_pid()").fetchone() for _ in range(3)}
        assert len(pids) == 1
        assert "past PgBouncer" in (pooler.found_in(connection) or "")


def test_a_pgbouncer_whose_role_has_the_relay_s_settings_is_found_too(
    reservation_database: ReservationDatabase, make_pgbouncer: MakePgBouncer
) -> None:
    """As somebody sets them who has read that they are missing."""
    with psycopg.connect(reservation_database.owner_url) as owner:
        name = reservation_database.name
        owner.execute(f'ALTER DATABASE "{name}" SET idle_session_timeout = 5000')
    url = make_pgbouncer(reservation_database, "transaction", "options,extra_float_digits")
    with psycopg.connect(url, autocommit=True, options=sql.SESSION_OPTIONS) as connection:
        assert "a connection pooler stands before Postgres" in (pooler.found_in(connection) or "")


def test_a_pgbouncer_that_refuses_the_session_s_settings_is_told_as_such(
    reservation_database: ReservationDatabase, make_pgbouncer: MakePgBouncer
) -> None:
    url = make_pgbouncer(reservation_database, "transaction", "extra_float_digits")
    with pytest.raises(psycopg.OperationalError) as refusal:
        psycopg.connect(url, options=sql.SESSION_OPTIONS)
    assert "past PgBouncer" in (pooler.told_by(refusal.value) or "")


def test_settings_that_are_dropped_on_the_way_are_found(
    reservation_database: ReservationDatabase,
) -> None:
    with psycopg.connect(reservation_database.relay_url, autocommit=True) as connection:
        assert "drops the session's settings" in (pooler.found_in(connection) or "")


def test_postgres_itself_is_never_taken_for_a_pooler(
    reservation_database: ReservationDatabase,
) -> None:
    with psycopg.connect(reservation_database.owner_url) as owner:
        name = reservation_database.name
        owner.execute(f'ALTER DATABASE "{name}" SET idle_session_timeout = 5000')
    for _ in range(3):
        with leadership.connect(reservation_database.relay_url) as connection:
            assert pooler.found_in(connection) is None


@pytest.mark.parametrize("fault", ["dbname=nowhere", "password=wrong", "port=1"])
def test_what_postgres_itself_refuses_is_no_pooler_s_doing(
    reservation_database: ReservationDatabase, fault: str
) -> None:
    wrong = psycopg.conninfo.make_conninfo(
        reservation_database.relay_url, **dict([fault.split("=")])
    )
    with pytest.raises(psycopg.OperationalError) as refusal:
        leadership.connect(wrong)
    assert pooler.told_by(refusal.value) is None


@pytest.mark.parametrize("ignored", ["options,extra_float_digits", "extra_float_digits"])
@pytest.mark.parametrize("command", ["run", "status"])
def test_the_command_refuses_with_one_line_that_says_where_to_go(
    reservation_database: ReservationDatabase,
    make_pgbouncer: MakePgBouncer,
    command: str,
    ignored: str,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "outbox_relay", command],
        env={
            "OUTBOX_RELAY_DATABASE_URL": make_pgbouncer(
                reservation_database, "transaction", ignored
            ),
            "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert "past PgBouncer" in line
