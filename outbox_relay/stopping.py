"""SIGTERM and SIGINT: finish what is in flight, within ten seconds whatever hangs."""

import os
import signal
import threading
from types import FrameType

FINISH_WITHIN_S = 6.0
END_WITHIN_S = 2.0


class StopOverdueError(Exception):
    """What was in flight did not finish in time; it is published again after the next start."""


class Stop:
    """A request to stop, made by a signal. Make it in the main thread."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)
        signal.signal(signal.SIGALRM, self._overdue)

    @property
    def requested(self) -> bool:
        """Whether to stop after the current step."""
        return self._requested.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait, but no longer than until a stop is requested; return whether it is."""
        return self._requested.wait(timeout_s)

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        if not self._requested.is_set():
            self._requested.set()
            signal.setitimer(signal.ITIMER_REAL, FINISH_WITHIN_S)

    def _overdue(self, _signal: int, _frame: FrameType | None) -> None:
        # Should even the end of that hang, on a server that is frozen, say.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, END_WITHIN_S)
        raise StopOverdueError
