"""Tells systemd how the worker is (`sd_notify`), and never harms it.

A datagram goes to the socket that systemd names; without one nothing is sent. The watchdog is fed
by turns of the loop alone, so a worker that hangs or is frozen is killed and started again.
"""

import math
import os
import socket
import time

import structlog

# systemd kills a service that is silent for the whole interval: two messages may get lost.
WATCHDOG_PARTS = 3
STATUS_MAX_CHARS = 200

log = structlog.get_logger()


class Notifier:
    """The service manager's socket, for one thread.

    Args:
        address: NOTIFY_SOCKET: a path, or `@name` for an abstract socket; empty for none.
        watchdog_usec: WATCHDOG_USEC: microseconds of silence that systemd takes; 0 for any.
        watchdog_pid: WATCHDOG_PID: the process that has to feed the watchdog; 0 for any.
    """

    def __init__(self, address: str = "", watchdog_usec: int = 0, watchdog_pid: int = 0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        ours = watchdog_usec > 0 and watchdog_pid in {0, os.getpid()}
        self._feed_interval_s = watchdog_usec / 1e6 / WATCHDOG_PARTS if ours else math.inf
        self._feed_at_s = 0.0  # monotonic
        self._status: str | None = None
        self._failed = False

    def turn(self, status: str) -> None:
        """Note a turn of the loop, cheaply: the first says that the start is complete.

        Args:
            status: what the worker does, in one line, for `systemctl status`.
        """
        now_s = time.monotonic()
        if not self._address or (status == self._status and now_s < self._feed_at_s):
            return
        ready = "READY=1\n" if self._status is None else ""
        line = " ".join(status.split())[:STATUS_MAX_CHARS]
        if self._sent(f"{ready}WATCHDOG=1\nSTATUS={line}"):
            self._status = status
            self._feed_at_s = now_s + self._feed_interval_s

    def _sent(self, message: str) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._failed:
                log.warning("systemd can't be notified", error=str(error))
            self._failed = True
            return False
        self._failed = False
        return True
