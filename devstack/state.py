"""Where the stack keeps its files: `.devstack/` of the repository, or `DEVSTACK_HOME`.

Each run has a folder of its own, so several stacks live side by side. A run's owner, and every
program it started, hold a lock on it; the kernel lets go of that when the last of them ends,
so a folder that can be locked belongs to nobody and the next start removes it. (A pid in a
file would lie after a reboot.)
"""

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from secrets import SystemRandom
from typing import Self

from devstack.processes import ConfigurationError, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent
HOME_LOCK_TIMEOUT_S = 30.0
PORT_RANGE_SIZE = 12_000
PORT_ATTEMPTS = 200
DESCRIBE_TIMEOUT_S = 10

_given_ports: set[int] = set()


def home() -> Path:
    """The state folder, made when missing.

    Raises:
        ConfigurationError: it cannot be written.
    """
    folder = Path(os.environ.get("DEVSTACK_HOME") or REPOSITORY / ".devstack").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cache").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"DEVSTACK_HOME: cannot write to {folder} ({error.strerror}); name a folder you own"
        ) from None
    return folder


def origin() -> dict[str, str]:
    """Return the day (`date`, UTC) and our `commit`, for what is published of a run."""
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit()}


def commit() -> str:
    """Which commit of ours this is, `-dirty` where files were changed."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=DESCRIBE_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return "not noted"  # an archive of the files, or no git
    return answer.stdout.strip()


def cache() -> Path:
    """What was downloaded, kept from run to run."""
    return home() / "cache"


@contextlib.contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock on a file; it ends with our process at the latest.

    Raises:
        TimeoutError: somebody else held it for `timeout_s`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        wait_until(lambda: try_lock(fd), timeout_s, f"the lock {path}")
        yield
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Take an exclusive lock on an open file, or say at once that somebody holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Run:
    """A folder for one run, removed at its end. Use it as a context manager."""

    def __init__(self) -> None:
        # Under the home's lock nobody takes our folder for a stale one before we have locked it.
        with locked(home() / "lock", HOME_LOCK_TIMEOUT_S):
            _remove_stale(home())
            self.path = Path(tempfile.mkdtemp(prefix="run-", dir=home()))
            self.lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try_lock(self.lock_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the folder; whoever used it has ended its programs before."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock_fd)


def _remove_stale(folder: Path) -> None:
    for old in folder.glob("run-*"):
        try:
            fd = os.open(old / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            continue  # another user's, or gone meanwhile
        if try_lock(fd):
            shutil.rmtree(old, ignore_errors=True)
        os.close(fd)


def free_port() -> int:
    """A free TCP port on 127.0.0.1, below those that the kernel gives to outgoing connections.

    A port from that range could be taken by any client between our choice and the server's
    start, or while a server is down that has to come back on the same port. Another stack may
    still be quicker, so who binds it has to be ready to ask again.

    Raises:
        ConfigurationError: no free port was found.
    """
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        end = int(text.split()[0])
    except OSError:
        end = 32768
    start = max(1024, end - PORT_RANGE_SIZE)
    if end - start < PORT_ATTEMPTS:
        start, end = 20000, 32768
    for _ in range(PORT_ATTEMPTS):
        port = SystemRandom().randrange(start, end)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            if port not in _given_ports:
                _given_ports.add(port)
                return port
    raise ConfigurationError(f"no free port on 127.0.0.1 between {start} and {end}")


def port_answers(port: int) -> bool:
    """Whether something accepts connections on this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
