"""What is said, in a line, where a tool is missing that the first minutes need."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make") or "make"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests must not count as the parent of the make that they run.
    left_out = ("JAVA_HOME", "MAKE", "MFLAGS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was said, without make's own last word."""
    said = done.stderr.strip().splitlines()
    return [line for line in said if not line.startswith("make: ***")]


@pytest.mark.parametrize("command", ["stack", "demo"])
def test_without_java_and_maven_a_line_says_what_to_install(tmp_path: Path, command: str) -> None:
    (tmp_path / "bin").mkdir()  # no java, no mvn, no apt-get, no docker
    done = run(
        *(sys.executable, "-m", "devstack", command),
        PATH=str(tmp_path / "bin"),
        DEVSTACK_HOME=str(tmp_path / "home"),
        DOCKER_HOST=f"unix://{tmp_path}/no-engine",
    )
    assert done.returncode == 2
    assert len(lines(done)) == 1
    assert "Kafka needs Java 17 and Maven: install" in lines(done)[0]
    assert "Docker" in lines(done)[0]


@pytest.mark.parametrize(
    ("python", "told"),
    [
        ("exit 127", "needs Python 3.11 or newer"),
        ('case "$*" in *version_info*) exit 1;; esac', "needs Python 3.11 or newer"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "needs Python's venv"),
    ],
    ids=["none", "old", "without venv"],
)
def test_without_a_usable_python_a_line_says_so(tmp_path: Path, python: str, told: str) -> None:
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{python}\n", encoding="ascii")
    (tmp_path / "python3").chmod(0o755)
    stamp = tmp_path / "venv"
    done = run(MAKE, "install", f"PYTHON={tmp_path}/python3", f"VENV={stamp}")
    assert done.returncode == 2
    assert len(lines(done)) == 1
    assert told in lines(done)[0]
    assert not stamp.exists()
