"""What is started ends with its starter, however that ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from devstack.processes import DevstackError, Process, ProcessDiedError, descendants, run
from tests.waiting import wait_until

# A program with a child of its own in a session of its own, as Postgres' backends are.
FAMILY = "setsid sleep 300 & echo started; wait"
STARTER = """
import signal, sys
from pathlib import Path
from devstack.processes import Process
process = Process(["sh", "-c", sys.argv[1]], log=Path(sys.argv[2]))
print(process.pid, flush=True)
signal.pause()
"""


def state(pid: int) -> str:
    """One letter from /proc, "Z" for a process that only waits for its parent; "" for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def gone(pids: list[int]) -> bool:
    return all(state(pid) in {"", "Z"} for pid in pids)


def family_of(process_id: int) -> list[int]:
    return wait_until(
        lambda: pids if len(pids := descendants(process_id)) >= 2 else [], 10, "the child"
    )


def start_family(tmp_path: Path) -> tuple[Process, list[int]]:
    process = Process(["sh", "-c", FAMILY], log=tmp_path / "log")
    return process, family_of(process.pid)


def test_a_program_and_its_descendants_end_when_their_starter_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, FAMILY, tmp_path / "log"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path.cwd(),
    ) as starter:
        assert starter.stdout
        pids = family_of(int(starter.stdout.readline()))
        starter.kill()
    wait_until(lambda: gone(pids), 10, "the end of all descendants")


def test_a_killed_leash_takes_its_program_along(tmp_path: Path) -> None:
    process = Process(["sleep", "300"], log=tmp_path / "log")
    leash_pid = process._leash.pid
    os.kill(leash_pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    wait_until(lambda: gone([process.pid]), 10, "the end of the program")


def test_a_killed_program_leaves_no_descendant(tmp_path: Path) -> None:
    process, pids = start_family(tmp_path)
    assert process.kill() == -signal.SIGKILL
    assert gone(pids)


def test_a_program_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    process = Process(["sh", "-c", "trap '' TERM; echo deaf; sleep 300"], log=tmp_path / "log")
    process.wait_ready(lambda: "deaf" in process.log_tail(), 10)
    assert process.stop(timeout_s=0.2) == -signal.SIGKILL


def test_a_program_that_heeds_the_request_gives_its_own_exit_code(tmp_path: Path) -> None:
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done"
    process = Process(["sh", "-c", script], log=tmp_path / "log")
    process.wait_ready(lambda: "ready" in process.log_tail(), 10)
    assert process.stop() == 7
    assert process.exit_code == 7


def test_an_early_death_is_told_with_the_end_of_the_log(tmp_path: Path) -> None:
    process = Process(["sh", "-c", "echo no disk left >&2; exit 3"], log=tmp_path / "log")
    with pytest.raises(ProcessDiedError, match="no disk left"):
        process.wait_ready(lambda: False, 10)
    assert process.exit_code == 3


def test_a_program_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    process = Process(["sleep", "300"], log=tmp_path / "log")
    with pytest.raises(TimeoutError, match="sleep to be ready"):
        process.wait_ready(lambda: False, 0.1)
    assert not process.alive


def test_a_program_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DevstackError, match="cannot start no-such-program"):
        run(["no-such-program"], log=tmp_path / "log", timeout_s=10)


def test_a_pause_freezes_the_descendants_too(tmp_path: Path) -> None:
    process, pids = start_family(tmp_path)
    process.pause()
    wait_until(lambda: {state(pid) for pid in pids} == {"T"}, 10, "all to be stopped")
    process.resume()
    wait_until(lambda: "T" not in {state(pid) for pid in pids}, 10, "all to go on")
    process.kill()


def test_output_and_errors_can_go_to_two_files(tmp_path: Path) -> None:
    output, log = tmp_path / "output", tmp_path / "log"
    process = Process(["sh", "-c", "echo one; echo two >&2"], log=log, stdout=output)
    assert process.wait(10) == 0
    assert (output.read_text(encoding="ascii"), log.read_text(encoding="ascii")) == (
        "one\n",
        "two\n",
    )


def test_waiting_in_vain_says_for_what() -> None:
    with pytest.raises(TimeoutError, match=r"0\.05 s in vain for rain; last: 0"):
        wait_until(lambda: 0, 0.05, "rain")
