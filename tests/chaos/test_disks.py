"""A small disk can be filled to the last byte, and has room again behind that."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos import disks
from chaos.disks import Disk
from tests.require import require


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    require(not disks.why_not(), "root, to mount a small filesystem")
    disk = Disk(tmp_path / "disk", 4)
    yield disk
    disk.close()
    assert not disk.folder.exists()


def test_a_full_disk_takes_nothing_until_it_is_mended(disk: Disk) -> None:
    file = disk.folder / "file"
    file.write_bytes(b"before")
    with disk.full():
        with pytest.raises(OSError, match="No space left") as caught:
            file.write_bytes(bytes(100_000))
        assert caught.value.errno == errno.ENOSPC
    file.write_bytes(bytes(100_000))
    assert file.stat().st_size == 100_000
