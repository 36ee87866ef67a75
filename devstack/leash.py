"""Keep one program and all its descendants on a leash: they live no longer than our parent.

Run as a script of its own (standard library only, it must start in milliseconds):

    leash.py STATUS_FD ORPHAN_SIGNAL GRACE_S COMMAND…

Standard input is a pipe whose other end only the starting process holds. The kernel closes it
when that process ends, a SIGKILL included, and the end of file is our order to clear up. A
parent-death signal from the starter itself would not do: it fires when the starting *thread*
ends, and a change of user (Postgres under root) clears it. It does serve one step further down,
where this script has a single thread and sets it after any change of user: there it covers the
case that the leash itself is killed.

STATUS_FD gets the lines `pid N` after the start and `exit CODE` (negative: the signal) when the
program and every descendant are gone, processes in sessions of their own too (Postgres makes
one per backend): as a subreaper we inherit them.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
# Nothing outlives a SIGKILL for long except a process stuck in the kernel; we don't wait on that.
CLEAR_UP_TIMEOUT_S = 10.0


def main(arguments: list[str]) -> None:
    """Start the command, wait for its end or our parent's, leave no descendant behind."""
    status_fd, orphan_signal, grace_s = int(arguments[0]), int(arguments[1]), float(arguments[2])
    os.set_inheritable(status_fd, False)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    leash_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(arguments[3:], libc, leash_pid)
    _tell(status_fd, f"pid {pid}\n")

    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(pidfd, select.POLLIN)
    ended = {fd for fd, _ in poll.poll()}
    if pidfd not in ended and orphan_signal != signal.SIGKILL:
        # A polite end first, for a program that has something to give back to the system.
        os.kill(pid, orphan_signal)
        os.kill(pid, signal.SIGCONT)
        select.select([pidfd], [], [], grace_s)
    code = _clear_up(pid)
    _tell(status_fd, f"exit {code}\n")


def _become(command: list[str], libc: ctypes.CDLL, leash_pid: int) -> None:
    """Turn the forked child into the command; never returns."""
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != leash_pid:
            os._exit(127)
        # Python ignores these; an ignored signal would stay ignored in the new program.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvp(command[0], command)  # noqa: S606 - the caller's own command, without a shell
    except OSError as error:
        _tell(2, f"cannot start {command[0]}: {error.strerror}\n")
    finally:
        os._exit(127)


def _clear_up(pid: int) -> int:
    """Kill our children until none is left; give the exit code of `pid`.

    Killing a child hands its own children to us, so this ends with the last descendant.
    """
    code = -int(signal.SIGKILL)
    deadline = time.monotonic() + CLEAR_UP_TIMEOUT_S
    while time.monotonic() < deadline:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == 0:
                time.sleep(0.002)
        except ChildProcessError:
            break
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
    return code


def _children() -> list[int]:
    """Pids of our living children. An unreaped pid isn't given out again, so these are ours."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name in parentheses may hold anything; fields are fixed after the last one.
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == os.getpid() and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def _tell(fd: int, line: str) -> None:
    """Write one line, to a parent that may be gone."""
    with contextlib.suppress(OSError):
        os.write(fd, line.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
