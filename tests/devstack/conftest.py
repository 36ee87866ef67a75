"""A state folder of its own for each test that starts the stack as a person does."""

import os
from pathlib import Path

import pytest

from devstack.state import REPOSITORY


@pytest.fixture
def own_home(tmp_path: Path) -> Path:
    """A state folder with the jars of the shared cache."""
    shared = Path(os.environ.get("DEVSTACK_HOME") or REPOSITORY / ".devstack") / "cache"
    shared.mkdir(parents=True, exist_ok=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cache").symlink_to(shared)
    return tmp_path / "home"
