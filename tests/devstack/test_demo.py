"""`make demo` and `make up` as a newcomer meets them."""

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from devstack.processes import Process, descendants
from devstack.state import REPOSITORY, free_port
from tests.waiting import wait_until

pytestmark = [pytest.mark.needs_postgres, pytest.mark.needs_kafka]

START_TIMEOUT_S = 90.0
DEMO_TIMEOUT_S = 150.0

StartDevstack = Callable[..., Process]


@pytest.fixture
def start_devstack(own_home: Path, tmp_path: Path) -> Iterator[StartDevstack]:
    """Starts `python -m devstack …` with everything it prints in `process.log`."""
    with ExitStack() as cleanup:

        def start(*arguments: str) -> Process:
            process = Process(
                [sys.executable, "-m", "devstack", *arguments],
                name="-".join(arguments[:1]),
                log=tmp_path / "log",
                cwd=REPOSITORY,
                env=os.environ | {"DEVSTACK_HOME": str(own_home)},
            )
            cleanup.callback(process.kill)
            return process

        yield start


def left(home: Path) -> set[str]:
    return {entry.name for entry in home.iterdir()} - {"cache", "lock", "env.lock"}


def test_the_demo_ends_with_every_place_in_agreement_and_leaves_nothing(
    start_devstack: StartDevstack, own_home: Path
) -> None:
    demo = start_devstack("demo", "--reservations", "500")
    assert demo.wait(DEMO_TIMEOUT_S) == 0, demo.log_tail()
    text = demo.log.read_text("utf-8")
    assert "Every place agrees: nothing lost, nothing doubled." in text
    for status in ("confirmed", "cancelled", "expired", "held"):
        assert f"│ {status}" in text
    assert "Traceback" not in text
    assert left(own_home) == set()


def test_ctrl_c_in_the_middle_of_the_demo_leaves_no_process_and_no_file(
    start_devstack: StartDevstack, own_home: Path
) -> None:
    demo = start_devstack("demo")
    wait_until(lambda: "reservations\n" in demo.log.read_text("utf-8"), 120, "bookings to run")
    family = descendants(demo.pid)
    assert len(family) > 10
    demo.send_signal(signal.SIGINT)
    assert demo.wait(40) == 130, demo.log_tail()
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)
    assert left(own_home) == set()
    assert "Traceback" not in demo.log.read_text("utf-8")


def test_up_serves_the_booking_page_until_it_is_told_to_stop(
    start_devstack: StartDevstack, own_home: Path
) -> None:
    port = free_port()
    up = start_devstack("up", "--port", str(port))
    up.wait_ready(lambda: "\nready\n" in up.log.read_text("utf-8"), START_TIMEOUT_S)
    page = httpx.get(f"http://127.0.0.1:{port}/", follow_redirects=True)
    assert page.status_code == 200
    assert "Northern Lights Tour" in page.text
    assert (own_home / "env").exists()
    up.send_signal(signal.SIGTERM)
    assert up.wait(30) == 0, up.log_tail()
    assert left(own_home) == set()


def test_on_a_terminal_too_ready_stands_in_a_line_alone(own_home: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"DEVSTACK_HOME": str(own_home), "TERM": "xterm"}
    stack = subprocess.Popen(
        [sys.executable, "-m", "devstack", "stack"],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=REPOSITORY, env=environment,
    )  # fmt: skip
    os.close(theirs)
    shown = bytearray()
    reader = threading.Thread(target=_read_into, args=(ours, shown), daemon=True)
    reader.start()
    try:
        wait_until(lambda: b"\r\nready\r\n" in shown, START_TIMEOUT_S, "the line `ready`")
    finally:
        stack.terminate()
        assert stack.wait(30) == 0


def _read_into(descriptor: int, shown: bytearray) -> None:
    # The terminal is closed (EIO) when the last program on it has ended.
    with contextlib.suppress(OSError):
        while data := os.read(descriptor, 4096):
            shown += data


def test_up_says_at_once_that_its_port_is_taken(start_devstack: StartDevstack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        up = start_devstack("up", "--port", str(port))
        assert up.wait(20) == 2
    assert f"port {port} on 127.0.0.1 is taken" in up.log.read_text("utf-8")
