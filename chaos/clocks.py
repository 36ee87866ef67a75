"""Clocks that are wrong, and jump while a program runs: see clock.c, which a compiler makes.

Only the time of day is changed, as when a machine's clock is set, and only for programs that are
started with `Clock.environment`.
"""

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")
COMPILE_TIMEOUT_S, PROBE_TIMEOUT_S = 60.0, 10.0
PROBED_S = 3_600
# A program whose threads can't wait any more would never end; one whose clock stays tells it.
PROBE = "import threading, time; threading.Event().wait(0.01); print(time.time())"
SECONDS = struct.Struct("@l")


class Clock:
    """A clock that is right until `set`, for the programs that are started with `environment`.

    Args:
        folder: where its files go.

    Raises:
        subprocess.CalledProcessError: the compiler doesn't like clock.c.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._library = folder / "clock", folder / "clock.so"
        subprocess.run(  # noqa: S603 - our own source
            ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-o", self._library, SOURCE, "-ldl"],  # noqa: S607
            check=True,
            capture_output=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        self.set(0)

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to go by this clock."""
        return {"LD_PRELOAD": str(self._library), "CLOCK_FILE": str(self._file)}

    def set(self, wrong_by_s: int) -> None:
        """Let the clock jump, at once: so many seconds ahead, or behind (below 0)."""
        # In place: who has mapped the file sees it.
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, SECONDS.pack(wrong_by_s), 0)
        finally:
            os.close(fd)


@cache
def why_not() -> str:
    """Say why no clock can be set wrong here; empty when it can."""
    if shutil.which("cc") is None:
        return "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        try:
            clock = Clock(Path(folder))
            clock.set(PROBED_S)
            told = subprocess.run(  # noqa: S603 - our own words
                [sys.executable, "-c", PROBE],
                env=os.environ | clock.environment,
                check=True,
                capture_output=True,
                timeout=PROBE_TIMEOUT_S,
            ).stdout
        except subprocess.CalledProcessError as error:
            return f"the compiler, or what it made, failed: {error.stderr.decode()[-200:]!r}"
        except subprocess.TimeoutExpired:
            return "no thread can wait by a clock that is wrong"
    jumped = float(told) > time.time() + PROBED_S / 2
    return "" if jumped else "programs don't ask a preloaded clock"
