"""Start a program and wait for it: the one place that does.

What is started here ends with the process that started it, a SIGKILL included (see `leash`).
A program is addressed by the pid its leash reported, never by its name.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")

LEASH = Path(__file__).with_name("leash.py")
POLL_INTERVAL_S = 0.02
LOG_TAIL_LINES = 20
LOG_TAIL_BYTES = 20_000
KILL_TIMEOUT_S = 15.0


class DevstackError(Exception):
    """The stack cannot do what was asked; the message is for a person and names the cure."""


class ConfigurationError(DevstackError):
    """A variable, or a program that is missing: for the user to mend (exit code 2)."""


class ProcessDiedError(DevstackError):
    """A program ended before it was ready; the message holds the end of its log."""


def wait_until(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """Call `condition` until it gives something true, and return that.

    Args:
        condition: cheap and bounded itself; what it raises goes to the caller.
        timeout_s: seconds after which we give up.
        what: what is waited for, for the message.

    Raises:
        TimeoutError: `condition` was still false after `timeout_s`; it is asked at least once.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}; last: {answer!r}")
        time.sleep(POLL_INTERVAL_S)


class Running(Protocol):
    """Something started that can be stopped: a local process or a container."""

    name: str

    @property
    def alive(self) -> bool:
        """Whether it has not ended (a paused one is alive)."""

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """As the function `wait_ready`."""

    def stop(self, timeout_s: float = 10.0, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end, insist after `timeout_s`; give its exit code."""

    def kill(self) -> int:
        """SIGKILL, without notice; give its exit code."""

    def pause(self) -> None:
        """Freeze it (SIGSTOP)."""

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""

    def log_tail(self) -> str:
        """The end of what it wrote."""


def wait_ready(running: Running, ready: Callable[[], bool], timeout_s: float) -> None:
    """Wait until `ready` says yes; end what was started when it doesn't come to that.

    Raises:
        ProcessDiedError: it ended first; with the tail of its log.
        TimeoutError: it lives but is not ready after `timeout_s`; it has been killed.
    """

    def ready_or_dead() -> bool:
        if not running.alive:
            raise ProcessDiedError(
                f"{running.name} ended before it was ready\n{running.log_tail()}"
            )
        return ready()

    try:
        wait_until(ready_or_dead, timeout_s, f"{running.name} to be ready")
    except TimeoutError as error:
        running.kill()
        raise TimeoutError(f"{error}\n{running.log_tail()}") from None


class Process:
    """A program on a leash, with its output in a file.

    `env` replaces the environment when given. Standard error goes to `log`, standard output too
    unless `stdout` names another file; both are appended to, so that a restart keeps the story.
    `orphan_signal` is what the program gets when our own process dies: SIGKILL at once, or a
    gentler one with `orphan_grace_s` seconds to follow it. `keep_fds` stay open in the leash,
    so that a lock held on one of them lasts as long as the program.

    Raises:
        DevstackError: the leash itself could not be started.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        name: str = "",
        stdout: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        orphan_signal: signal.Signals = signal.SIGKILL,
        orphan_grace_s: float = 3.0,
        keep_fds: Sequence[int] = (),
    ) -> None:
        self.command = [str(part) for part in command]
        self.name = name or Path(self.command[0]).name
        self.log = log
        self._code: int | None = None
        status_read, status_write = os.pipe()
        leash = [sys.executable, "-I", "-S", str(LEASH), str(status_write)]
        leash += [str(int(orphan_signal)), str(orphan_grace_s), *self.command]
        with contextlib.ExitStack() as files:
            files.callback(os.close, status_write)
            error_file = files.enter_context(log.open("ab"))
            output_file = files.enter_context(stdout.open("ab")) if stdout else error_file
            self._leash = subprocess.Popen(
                leash,
                stdin=subprocess.PIPE,
                stdout=output_file,
                stderr=error_file,
                env=None if env is None else dict(env),
                cwd=cwd,
                pass_fds=(status_write, *keep_fds),
                start_new_session=True,  # Ctrl-C at the terminal is ours to handle, not theirs
            )
        self._status = os.fdopen(status_read, "r", encoding="ascii")
        first = self._status.readline().split()
        if not first:
            self._ended()
            raise DevstackError(f"{self.name} could not be started\n{self.log_tail()}")
        self.pid = int(first[1])

    def __repr__(self) -> str:
        return f"<{self.name} pid {self.pid}{'' if self.alive else ' ended'}>"

    @property
    def alive(self) -> bool:
        """Whether the program or a descendant of it is still there."""
        if self._code is None and self._leash.poll() is not None:
            self._ended()
        return self._code is None

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while alive."""
        return None if self.alive else self._code

    def wait(self, timeout_s: float) -> int:
        """Wait for the end and give the exit code.

        Raises:
            TimeoutError: it still runs after `timeout_s`.
        """
        if self._code is None:
            try:
                self._leash.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"{self.name} still runs after {timeout_s:g} s") from None
            self._ended()
        assert self._code is not None  # noqa: S101 - set by _ended
        return self._code

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """As the function `wait_ready`."""
        wait_ready(self, ready, timeout_s)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the program alone; nothing happens when it has ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self, timeout_s: float = 10.0, how: signal.Signals = signal.SIGTERM) -> int:
        """Ask the program to end with the signal `how`; after `timeout_s` kill it."""
        self.send_signal(how)
        try:
            return self.wait(timeout_s)
        except TimeoutError:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL; back when every descendant is gone too."""
        self.send_signal(signal.SIGKILL)
        return self.wait(KILL_TIMEOUT_S)

    def pause(self) -> None:
        """Freeze the program and its descendants."""
        self._signal_tree(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the program and its descendants go on."""
        self._signal_tree(signal.SIGCONT)

    def log_tail(self) -> str:
        """The last lines of the log, indented."""
        return tail(self.log)

    def _signal_tree(self, number: signal.Signals) -> None:
        if not self.alive:
            return
        for pid in descendants(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _ended(self) -> None:
        """Take the exit code from the leash and close what we hold of it."""
        with self._status:
            words = self._status.read().split()
        # No report: the leash itself was killed, and took the program along.
        self._code = int(words[words.index("exit") + 1]) if "exit" in words else -signal.SIGKILL
        if self._leash.stdin:
            self._leash.stdin.close()
        self._leash.wait(KILL_TIMEOUT_S)


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    keep_fds: Sequence[int] = (),
) -> None:
    """Run a program to its end.

    Raises:
        DevstackError: it ended with a code other than 0; with the tail of its log.
        TimeoutError: it was still running after `timeout_s` and has been killed.
    """
    succeed(Process(command, log=log, env=env, cwd=cwd, keep_fds=keep_fds), timeout_s)


def succeed(
    process: Process, timeout_s: float, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Wait for a program that has to end with code 0, calling `meanwhile` at short intervals.

    Raises:
        DevstackError: it ended with another code; with the tail of its log.
        TimeoutError: it was still running after `timeout_s` and has been killed.
    """

    def ended() -> bool:
        meanwhile()
        return not process.alive

    try:
        wait_until(ended, timeout_s, f"the end of {process.name}")
    except BaseException:
        process.kill()
        raise
    if code := process.wait(0):
        raise DevstackError(f"{process.name} failed with code {code}\n{process.log_tail()}")


def descendants(pid: int) -> list[int]:
    """`pid` and all below it, parents first, as seen in /proc at this moment."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text(errors="replace")
                parent = int(stat.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for known in found:
        found.extend(children.get(known, ()))
    return found


def tail(path: Path) -> str:
    """The last lines of a file, indented; empty when there is none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        return indented(file.read().decode(errors="replace"))
    return ""


def indented(text: str) -> str:
    """The last lines of a program's output, set off from our own words."""
    return "\n".join(f"    {line}" for line in text.splitlines()[-LOG_TAIL_LINES:])
