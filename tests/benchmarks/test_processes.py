"""What a process costs is read for itself and for its children."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.processes import cost, cpu_s, peak_memory_mib
from tests.waiting import wait_until

# Spends CPU in a thread, then 64 MiB for a moment, then says so and waits.
SPENDER = """
import sys, threading, time
def spend():
    end = time.thread_time() + 0.3
    while time.thread_time() < end: pass
thread = threading.Thread(target=spend); thread.start(); thread.join()
bytearray(64 * 2**20)
print("done", flush=True); sys.stdin.read()
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {SPENDER!r}])
"""


@pytest.fixture(params=[SPENDER, PARENT], ids=["itself", "its child"])
def spender(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        yield process
        process.kill()


def test_cpu_is_counted_of_ended_threads_and_of_children_too(
    spender: subprocess.Popen[str],
) -> None:
    found = cost({"us": spender.pid})
    assert 0.3 <= found.cpu_s["us"] < 2
    assert cost({"us": spender.pid}).since(found)["us"] < 0.1


def test_peak_memory_outlives_what_was_freed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SPENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        peak = peak_memory_mib(process.pid)
        process.kill()
    assert peak is not None
    assert 64 < peak < 150


def test_a_process_that_is_gone_costs_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(10)
    assert wait_until(lambda: cpu_s(process.pid) == 0, 5, "its end")
    assert peak_memory_mib(process.pid) is None
