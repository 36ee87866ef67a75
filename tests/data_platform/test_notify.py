"""What systemd is told of a worker, on a real datagram socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from data_platform.health import Health
from data_platform.notify import Notifier

HOUR_USEC = 3_600_000_000


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


@pytest.fixture
def systemd(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.setblocking(False)
        yield receiver


def received(receiver: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(receiver.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_systemd_hears_of_the_first_turn_an_outage_and_stopped_partitions(
    address: str, systemd: socket.socket
) -> None:
    health = Health(Notifier(address))
    assert not received(systemd)
    health.beat({})
    health.beat({})
    health.waits_for("Kafka\nis away")
    health.beat({})
    health.waits_for(None)
    health.beat({"concert-reservation 3": "made anew"})
    assert received(systemd) == [
        "READY=1\nWATCHDOG=1\nSTATUS=loading",
        "WATCHDOG=1\nSTATUS=waiting: Kafka is away",
        "WATCHDOG=1\nSTATUS=stopped partitions: concert-reservation 3; loading",
    ]


@pytest.mark.parametrize(
    ("usec", "pid", "messages"),
    [(1, 0, 3), (1, os.getpid(), 3), (HOUR_USEC, 0, 1), (0, 0, 1), (1, 1, 1)],
    ids=["due", "due, ours", "not due", "none wanted", "another's"],
)
def test_only_turns_feed_the_watchdog_when_it_is_due_and_ours(
    address: str, systemd: socket.socket, usec: int, pid: int, messages: int
) -> None:
    notifier = Notifier(address, usec, pid)
    for _ in range(3):
        notifier.turn("loading")
    assert len(received(systemd)) == messages


def test_a_socket_that_is_gone_harms_nobody_and_hears_of_the_start_when_it_is_back(
    address: str,
) -> None:
    notifier = Notifier(address)
    with capture_logs() as logs:
        notifier.turn("loading")
        notifier.turn("loading")
    assert len(logs) == 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.setblocking(False)
        notifier.turn("loading")
        assert received(receiver) == ["READY=1\nWATCHDOG=1\nSTATUS=loading"]
