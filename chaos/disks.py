"""Small disks that can be filled to the last byte: a tmpfs each, which only root may mount.

They are mounted where nobody else sees them (`enter_own_mounts`), so that none is left behind by a
run that is killed.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MOUNT_TIMEOUT_S = 20.0
OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]
MARK = "CHAOS_OWN_MOUNTS"
REFILL_INTERVAL_S = 0.1


class Disk:
    """A folder of limited size."""

    def __init__(self, folder: Path, size_mib: int) -> None:
        self.folder = folder
        folder.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=755", "chaos", str(folder))

    @contextmanager
    def full(self) -> Iterator[None]:
        """Leave not a byte free while the block runs, whatever is freed meanwhile."""
        ballast, stop = self.folder / "ballast", threading.Event()

        def fill() -> None:
            while not stop.wait(REFILL_INTERVAL_S):
                _fill(ballast)

        _fill(ballast)
        filling = threading.Thread(target=fill, daemon=True)
        filling.start()
        try:
            yield
        finally:
            stop.set()
            filling.join()
            ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Take it away, with what is on it."""
        # Lazily: a program that is just ending may still have a file open.
        _run("umount", "--lazy", str(self.folder))
        self.folder.rmdir()


def why_not() -> str:
    """Return why there can be no small disks here; empty when there can."""
    if os.geteuid() != 0:
        return "only root may mount a small filesystem"
    if not shutil.which("unshare"):
        return "there is no `unshare` (util-linux)"
    tried = subprocess.run(  # noqa: S603 - our own arguments
        [*OWN_MOUNTS, "true"], check=False, capture_output=True, timeout=MOUNT_TIMEOUT_S
    )
    return "" if tried.returncode == 0 else "this machine lets nobody mount a filesystem"


def enter_own_mounts() -> None:
    """Begin this program again in a mount namespace of its own, unless it is there or can't.

    By a new start, because a namespace is a thread's: programs started by others would not see
    what is mounted.
    """
    if MARK not in os.environ and not why_not():
        command = [*OWN_MOUNTS, sys.executable, "-m", "chaos", *sys.argv[1:]]
        os.execvpe(command[0], command, os.environ | {MARK: "1"})  # noqa: S606


def _fill(ballast: Path) -> None:
    fd = os.open(ballast, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        free = os.fstatvfs(fd)
        with suppress(OSError):  # somebody else was quicker to take the rest
            if free.f_bavail:
                size = os.fstat(fd).st_size
                os.posix_fallocate(fd, size, free.f_bavail * free.f_frsize)
    finally:
        os.close(fd)


def _run(*command: str) -> None:
    subprocess.run(  # noqa: S603 - our own arguments
        command, check=True, capture_output=True, timeout=MOUNT_TIMEOUT_S
    )
