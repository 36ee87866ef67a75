"""Folders and ports: several stacks side by side, and nothing left of dead ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devstack.processes import ConfigurationError, Process
from devstack.stack import EnvironmentFile
from devstack.state import Run, free_port, home, locked

OWNER = (
    "import signal\nfrom devstack.state import Run\nprint(Run().path, flush=True)\nsignal.pause()"
)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEVSTACK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_run_leaves_alone_a_run_that_lives_and_removes_one_whose_owner_was_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        other = Path(owner.stdout.readline().strip())
        with Run() as run:
            assert other.is_dir()
            assert run.path != other
        assert not run.path.exists()
        owner.kill()
    with Run():
        assert not other.exists()


def test_a_folder_stays_as_long_as_a_program_of_its_run_lives(tmp_path: Path) -> None:
    first = Run()
    program = Process(["sleep", "300"], log=tmp_path / "log", keep_fds=[first.lock_fd])
    os.close(first.lock_fd)  # as the kernel does for an owner that was killed
    with Run():
        assert first.path.is_dir()
    program.kill()
    with Run():
        assert not first.path.exists()


def test_a_lock_that_is_held_is_waited_for_only_so_long(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", 1),
        pytest.raises(TimeoutError, match="lock"),
        locked(tmp_path / "lock", 0.05),
    ):
        pass


def test_ports_are_not_among_those_that_the_kernel_gives_away() -> None:
    first, *_ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
    ports = {free_port() for _ in range(20)}
    assert len(ports) == 20
    assert max(ports) < int(first)


def test_the_environment_file_is_whole_private_and_gone_at_the_end() -> None:
    with EnvironmentFile() as file:
        path = file.write({"A": "one", "B": "two?x=%2F"})
        assert path.read_text(encoding="ascii") == "export A='one'\nexport B='two?x=%2F'\n"
        assert path.stat().st_mode & 0o777 == 0o600
        assert {entry.name for entry in home().iterdir()} == {"cache", "env", "env.lock"}
    assert not path.exists()


def test_a_second_stack_does_not_take_the_environment_file_of_the_first() -> None:
    with EnvironmentFile() as file:
        path = file.write({"A": "one"})
        with pytest.raises(ConfigurationError, match="DEVSTACK_HOME"):
            EnvironmentFile()
        assert path.exists()


def test_the_environment_file_of_a_killed_stack_is_removed(own_home: Path) -> None:
    home()
    (own_home / "env").write_text("export A='stale'\n", encoding="ascii")
    with EnvironmentFile() as file:
        assert not file.path.exists()


def test_a_home_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVSTACK_HOME", "/proc/nowhere")
    with pytest.raises(ConfigurationError, match="DEVSTACK_HOME"):
        home()
