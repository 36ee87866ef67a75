"""A machine with systemd as PID 1, driven by the command that SYSTEMD_BOX names.

That command knows `start [--bind=…]`, `exec COMMAND…` and `stop`, as systemd-nspawn's options go,
and shares our network. Its disk is empty at each start; what has to survive a reboot is bound to
folders of ours.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from devstack.processes import DevstackError

BOOT_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 120.0
# Where install.sh writes; each is bound as a whole, so that it can be emptied.
LASTING = ("/opt", "/etc/opt", "/etc/systemd/system")
VENV_MODULE = """
import ensurepip, sysconfig
print(ensurepip.__path__[0], sysconfig.get_config_var("WHEEL_PKG_DIR") or "")
"""


class Box:
    """The machine; `stop` and `start` are a reboot."""

    def __init__(self, command: Path, disk: Path, shared: Path) -> None:
        self._command = command
        self._environment = os.environ | {"SD_NAME": f"concert-{os.getpid()}"}
        self._binds = [f"--bind-ro={shared}:/mnt"]
        for folder in LASTING:
            place = disk / folder.strip("/").replace("/", "-")
            place.mkdir(parents=True)
            self._binds.append(f"--bind={place}:{folder}")
        # Debian packs them on their own; to have them there is what install.sh asks for.
        found = self._ran([Path("/usr/bin/python3"), "-c", VENV_MODULE], 10)
        self._binds += [f"--bind-ro={place}" for place in found.split()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Boot.

        Raises:
            DevstackError: it didn't come up; with what was said.
        """
        self._ran([self._command, "start", *self._binds], BOOT_TIMEOUT_S)

    def stop(self) -> None:
        """Halt in order; nothing happens when it doesn't run."""
        self._ran([self._command, "stop"], COMMAND_TIMEOUT_S)

    def __call__(
        self, *command: str, told: str = "", timeout_s: float = COMMAND_TIMEOUT_S, code: int = 0
    ) -> str:
        """Run a command on it, `told` as its input; return what it printed.

        Raises:
            DevstackError: it ended with another code; with what it said.
        """
        return self._ran([self._command, "exec", *command], timeout_s, told, code)

    def write(self, path: str, text: str) -> None:
        """Make a file, and its folder; a secret for root alone."""
        umask = "077" if "/secrets/" in path else "022"
        script = 'umask "$2"; mkdir -p "${1%/*}"; cat > "$1"'
        self("bash", "-c", script, "bash", path, umask, told=text)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self("systemctl", "show", "--value", "--property", name, unit).strip()

    def process(self, unit: str) -> tuple[int, str]:
        """A service's process id while it is active, else 0, and the release that it runs."""
        number = self.show(unit, "MainPID") if self.show(unit, "ActiveState") == "active" else "0"
        if number == "0":
            return 0, ""
        # It may end before we look.
        command = self("bash", "-c", "cat /proc/$1/cmdline 2>/dev/null || true", "bash", number)
        release = command.partition("/releases/")[2].partition("/")[0]
        return (int(number), release) if command else (0, "")

    def _ran(
        self, command: Sequence[str | Path], timeout_s: float, told: str = "", code: int = 0
    ) -> str:
        try:
            done = subprocess.run(
                command, env=self._environment, input=told, capture_output=True, text=True,
                timeout=timeout_s, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DevstackError(str(error)) from None
        if done.returncode != code:
            said = (done.stdout + done.stderr).strip()[-3_000:]
            what = " ".join(map(str, command[1:]))
            raise DevstackError(f"{what}: exit code {done.returncode}, not {code}\n{said}")
        return done.stdout + done.stderr
