"""Quix Streams' PostgreSQL sink beside our loader: how its program is put up and run.

It loads the flat records that the JDBC sink loads, too. Its libraries are put into a folder of the
cache, once, and are seen by its program (`quix_sink`) only: they need other versions than ours.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.surroundings import Surroundings
from devstack.processes import Process, succeed
from devstack.state import cache, locked

VERSION = "3.28.1"
# As many as a batch of the JDBC sink has.
COMMIT_ROWS = 5_000
INSTALL_TIMEOUT_S = 300.0


def installed(around: Surroundings) -> Path:
    """Return the folder with its libraries; filled when missing.

    Raises:
        DevstackError: that failed; with the end of pip's output.
    """
    folder = cache() / f"quixstreams-{VERSION}"
    with locked(cache() / "lock", INSTALL_TIMEOUT_S):
        if not folder.is_dir():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            wanted = f"quixstreams[postgresql]=={VERSION}"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target"]
            pip = Process(
                [*command, str(unfinished), wanted],
                name="pip",
                log=around.stack.run.path / "pip.log",
            )
            succeed(pip, INSTALL_TIMEOUT_S)
            unfinished.rename(folder)
    return folder


@contextmanager
def sink(around: Surroundings, topic: str) -> Iterator[Process]:
    """Load a topic while the block runs."""
    environment = {"PYTHONPATH": str(installed(around))}
    arguments = (topic, f"quix-{topic}", str(COMMIT_ROWS))
    process = around.program("benchmarks.quix_sink", *arguments, name="sink-quix", env=environment)
    try:
        yield process
    finally:
        process.stop()
