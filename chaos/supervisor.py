"""Starts again whatever ends, as systemd would: after a pause that doubles, up to a bound.

A part is a program of ours, a broker or a Postgres server. Faults strike parts, and may hold one
down for a while; nobody else starts one.
"""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from devstack.processes import DevstackError, Process, Running

TICK_S = 0.05
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0
# Who has lived so long is well: the next pause is the first again.
WELL_AFTER_S = 10.0
STOP_TIMEOUT_S = 15.0
JOIN_TIMEOUT_S = 60.0


class Part:
    """Something that shall always run.

    Args:
        name: for people.
        launch: starts it, without waiting; only called while it doesn't run.
        running: what was launched last.
    """

    def __init__(
        self, name: str, launch: Callable[[], None], running: Callable[[], Running]
    ) -> None:
        self.name = name
        self.environment: dict[str, str] = {}
        self.ended_by_itself = 0
        self._launch = launch
        self._running = running
        self._lock = threading.RLock()
        self._held = False
        self._struck = False
        self._pause_s = FIRST_PAUSE_S
        self._began_s = time.monotonic()
        self._down_since_s: float | None = None

    @property
    def alive(self) -> bool:
        """Whether it runs; a frozen one does."""
        with self._lock:
            return self._running().alive

    @property
    def pid(self) -> int | None:
        """Its process id, where it is a program of this machine."""
        running = self._running()
        return running.pid if isinstance(running, Process) else None

    def look_after(self) -> None:
        """Start it when it has ended, and its pause is over."""
        if not self._lock.acquire(blocking=False):
            return  # somebody is ending it, and others want to be looked after
        try:
            now = time.monotonic()
            if self._held or self.alive:
                return
            if self._down_since_s is None:
                self._down_since_s = now
                self.ended_by_itself += not self._struck
                well = now - self._began_s > WELL_AFTER_S
                self._pause_s = FIRST_PAUSE_S if well else min(2 * self._pause_s, LONGEST_PAUSE_S)
            if now - self._down_since_s >= self._pause_s:
                self._down_since_s, self._struck, self._began_s = None, False, now
                self._launch()
        finally:
            self._lock.release()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> bool:
        """End it; it is started again. Return whether it ran."""
        with self._lock:
            ran, self._struck = self.alive, True
            self._running().stop(STOP_TIMEOUT_S, how)
            return ran

    @contextmanager
    def held_down(self) -> Iterator[None]:
        """Kill it, and start it again behind the block only."""
        with self._lock:
            self._held = True
            self.kill()
        try:
            yield
        finally:
            self._held = False

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop it (SIGSTOP) for as long as the block runs."""
        running = self._running()
        if not running.alive:
            raise DevstackError(f"{self.name} doesn't run: nothing to freeze")
        running.pause()
        try:
            yield
        finally:
            running.resume()

    def end(self) -> int:
        """Ask it to end, for good; return its exit code."""
        with self._lock:
            self._held = True
            self._running().resume()
            return self._running().stop(STOP_TIMEOUT_S)


class Supervisor:
    """Looks after parts while its block runs."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = {part.name: part for part in parts}
        self.failures: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(JOIN_TIMEOUT_S)

    def _watch(self) -> None:
        while not self._stop.wait(TICK_S):
            for part in self.parts.values():
                try:
                    part.look_after()
                except (DevstackError, OSError) as error:  # tried again with the next pause
                    self.failures[f"{part.name}: {error}"] += 1
