"""SIGTERM before a command has begun its work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("arguments", [["serve"], ["expire-holds", "--every", "5"]])
def test_asked_to_end_while_it_still_imports_it_ends_well(
    tmp_path: Path, arguments: list[str]
) -> None:
    # A library that takes long to import, and says so.
    (tmp_path / "click.py").write_text(
        "import sys, time\nprint('importing', flush=True)\ntime.sleep(20)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-m", "reservation_service", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
    ) as early:
        assert early.stdout is not None
        assert early.stdout.readline() == b"importing\n"
        early.terminate()
        assert early.wait(10) == 0
