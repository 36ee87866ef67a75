"""Tells systemd how the relay is (`sd_notify`), and never harms it.

Messages are datagrams to the socket that systemd names; without one nothing is sent. The watchdog
is fed only where the caller has seen progress, so a loop that hangs is killed and started again. A
socket that is gone or full is logged once; the relay goes on.
"""

import os
import socket
import threading
import time

import structlog

# systemd kills a service that is silent for the whole interval: two messages may get lost.
WATCHDOG_PARTS = 3
STATUS_MAX_CHARS = 200

log = structlog.get_logger()


class Notifier:
    """The service manager's socket; usable from any thread.

    Args:
        address: NOTIFY_SOCKET: a path, or `@name` for an abstract socket; empty for none.
        watchdog_usec: WATCHDOG_USEC: microseconds of silence that systemd takes; 0 for any.
        watchdog_pid: WATCHDOG_PID: the process that has to feed the watchdog; 0 for any.
    """

    def __init__(self, address: str = "", watchdog_usec: int = 0, watchdog_pid: int = 0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        ours = watchdog_pid in {0, os.getpid()}
        self._feed_interval_s = watchdog_usec / 1e6 / WATCHDOG_PARTS if ours else 0.0
        self._fed_at_s = -self._feed_interval_s  # monotonic
        self._status = ""
        self._failed = False
        self._lock = threading.Lock()

    def ready(self) -> None:
        """Say that the start is complete: whoever waits for this service may go on."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        """Say in one line what the relay does, for `systemctl status`; repeats are not sent."""
        line = " ".join(text.split())[:STATUS_MAX_CHARS]
        with self._lock:
            changed, self._status = line != self._status, line
        if changed:
            self._send(f"STATUS={line}")

    def progressed(self) -> None:
        """Feed the watchdog: to be called on progress only; cheap enough for a loop's turn."""
        with self._lock:
            now_s = time.monotonic()
            if not self._feed_interval_s or now_s - self._fed_at_s < self._feed_interval_s:
                return
            self._fed_at_s = now_s
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the service ends by itself."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._failed:
                log.warning("systemd can't be notified", error=str(error))
            self._failed = True
        else:
            self._failed = False
