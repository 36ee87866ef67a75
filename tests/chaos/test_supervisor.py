"""What ends is started again, with pauses that grow; what is held down stays down."""

import sys
import time
from pathlib import Path

import pytest

from chaos.supervisor import LONGEST_PAUSE_S, Part, Supervisor
from devstack.processes import Process
from tests.waiting import wait_until

SLEEPS = "import time; time.sleep(60)"


class Program:
    """A program that a part launches, and how often it was."""

    def __init__(self, code: str, folder: Path) -> None:
        self.code, self.folder = code, folder
        self.launched_s: list[float] = []
        self.launch()

    def launch(self) -> None:
        self.launched_s.append(time.monotonic())
        self.process = Process([sys.executable, "-c", self.code], log=self.folder / "log")

    def part(self) -> Part:
        return Part("program", self.launch, lambda: self.process)


@pytest.fixture
def sleeper(tmp_path: Path) -> Program:
    return Program(SLEEPS, tmp_path)


def test_a_killed_part_is_started_again_and_that_is_not_its_own_doing(sleeper: Program) -> None:
    part = sleeper.part()
    with Supervisor([part]):
        part.kill()
        wait_until(lambda: part.alive, 10, "a new start")
        assert part.ended_by_itself == 0
        assert part.end() != 0
    assert not part.alive


def test_a_part_that_is_held_down_comes_back_behind_the_block(sleeper: Program) -> None:
    part = sleeper.part()
    with Supervisor([part]):
        with part.held_down():
            assert not part.alive
            before = len(sleeper.launched_s)
            time.sleep(0.5)  # that nothing happens can't be waited for
            assert len(sleeper.launched_s) == before
        wait_until(lambda: part.alive, 10, "a new start")
        part.end()


def test_a_part_that_ends_at_once_is_started_with_pauses_that_grow_to_a_bound(
    tmp_path: Path,
) -> None:
    program = Program("", tmp_path)
    part = program.part()
    with Supervisor([part]):
        wait_until(lambda: len(program.launched_s) >= 6, 30, "some starts")
        part.end()
    pauses = [b - a for a, b in zip(program.launched_s, program.launched_s[1:], strict=False)]
    assert pauses[-1] > 4 * pauses[0]
    assert max(pauses) < LONGEST_PAUSE_S + 2
    assert part.ended_by_itself >= 5
