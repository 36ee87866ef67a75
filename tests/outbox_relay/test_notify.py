"""What systemd is told, on a real datagram socket."""

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from outbox_relay.notify import Notifier

HOUR_USEC = 3_600_000_000


@contextmanager
def systemd(address: str | Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        receiver.setblocking(False)
        yield receiver


def received(receiver: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(receiver.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_systemd_hears_of_the_start_the_state_and_the_end(tmp_path: Path) -> None:
    with systemd(tmp_path / "notify") as receiver:
        notifier = Notifier(str(tmp_path / "notify"))
        notifier.ready()
        notifier.status("leading,\n0 rows behind")
        notifier.stopping()
        assert received(receiver) == ["READY=1", "STATUS=leading, 0 rows behind", "STOPPING=1"]


def test_an_abstract_socket_is_a_socket_too() -> None:
    name = f"outbox-relay-{uuid.uuid4()}"
    with systemd(f"\0{name}") as receiver:
        Notifier(f"@{name}").ready()
        assert received(receiver) == ["READY=1"]


def test_an_unchanged_status_is_not_repeated(tmp_path: Path) -> None:
    with systemd(tmp_path / "notify") as receiver:
        notifier = Notifier(str(tmp_path / "notify"))
        for text in ("standing by", "standing by", "leading", "standing by"):
            notifier.status(text)
        assert received(receiver) == [
            "STATUS=standing by",
            "STATUS=leading",
            "STATUS=standing by",
        ]


def test_the_watchdog_is_fed_on_progress_and_not_at_each_turn_of_the_loop(tmp_path: Path) -> None:
    with systemd(tmp_path / "notify") as receiver:
        notifier = Notifier(str(tmp_path / "notify"), HOUR_USEC, os.getpid())
        assert received(receiver) == []
        for _ in range(10_000):
            notifier.progressed()
        assert received(receiver) == ["WATCHDOG=1"]
        eager = Notifier(str(tmp_path / "notify"), watchdog_usec=1)
        eager.progressed()
        eager.progressed()
        assert received(receiver) == ["WATCHDOG=1", "WATCHDOG=1"]


@pytest.mark.parametrize(("usec", "pid"), [(0, 0), (HOUR_USEC, 1)])
def test_a_watchdog_that_is_off_or_another_process_s_is_not_fed(
    tmp_path: Path, usec: int, pid: int
) -> None:
    with systemd(tmp_path / "notify") as receiver:
        Notifier(str(tmp_path / "notify"), usec, pid).progressed()
        assert received(receiver) == []


def test_without_a_socket_nothing_happens() -> None:
    with capture_logs() as logs:
        notifier = Notifier()
        notifier.ready()
        notifier.status("leading")
        notifier.stopping()
    assert logs == []


def test_a_socket_that_went_away_is_logged_once_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    notifier = Notifier(str(path), watchdog_usec=1)
    with capture_logs() as logs:
        for number in range(100):
            notifier.progressed()
            notifier.status(f"{number} rows behind")
    assert [entry["event"] for entry in logs] == ["systemd can't be notified"]
    with systemd(path) as receiver:
        notifier.progressed()
        assert received(receiver) == ["WATCHDOG=1"]


def test_a_socket_that_nobody_empties_does_not_hold_the_relay_up(tmp_path: Path) -> None:
    with systemd(tmp_path / "notify") as receiver, capture_logs() as logs:
        notifier = Notifier(str(tmp_path / "notify"))
        for number in range(5_000):
            notifier.status(f"{number} rows behind")
        assert len(logs) == 1
        assert received(receiver)[0] == "STATUS=0 rows behind"
