"""A clock that jumps while a program runs, and what must not jump with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos import clocks
from chaos.clocks import Clock
from tests.require import require

# Asked by a line, it tells its time of day and how long a thread has waited for 50 ms.
PROGRAM = """
import sys, threading, time
for _ in sys.stdin:
    began = time.monotonic()
    threading.Event().wait(0.05)
    print(time.time(), time.monotonic() - began, flush=True)
"""


@pytest.mark.parametrize("wrong_by_s", [3_600, -1_800])
def test_the_time_of_day_jumps_and_whoever_waits_waits_as_long_as_before(
    tmp_path: Path, wrong_by_s: int
) -> None:
    why_not = clocks.why_not()
    require(not why_not, why_not)
    clock = Clock(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | clock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdin
        assert program.stdout
        for expected_s in (0, wrong_by_s, 0):
            clock.set(expected_s)
            program.stdin.write("tell\n")
            program.stdin.flush()
            told_s, waited_s = map(float, program.stdout.readline().split())
            assert told_s - time.time() == pytest.approx(expected_s, abs=30)
            assert 0.05 <= waited_s < 30
        program.stdin.close()
    assert program.returncode == 0
