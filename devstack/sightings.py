"""How long a booking takes from its answer to the analysts' tables, seen from outside.

The clock starts when the customer has the answer and stops when a query of the `analyst` role
returns the reservation. A thread asks for all awaited ones every POLL_INTERVAL_S, which is the
resolution of the figures.
"""

import threading
import time
from typing import Self

import psycopg

POLL_INTERVAL_S = 0.005
WATCH_EVERY = 4
JOIN_TIMEOUT_S = 10.0
SEEN = """
SELECT reservation_id FROM analytics.fct_reservations WHERE reservation_id = ANY(%s)
"""


class Sightings:
    """Watches every fourth booking. Use as a context manager; `latencies_s` afterwards."""

    def __init__(self, analyst_url: str) -> None:
        self._url = analyst_url
        self._lock = threading.Lock()
        self._booked = 0
        self._awaited: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.latencies_s: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(JOIN_TIMEOUT_S)

    def booked(self, reservation_id: str) -> None:
        """Note that a customer has just got this answer. Any thread may call."""
        with self._lock:
            self._booked += 1
            if self._booked % WATCH_EVERY == 0:
                self._awaited[reservation_id] = time.monotonic()

    @property
    def waiting(self) -> int:
        """How many watched bookings have not been seen yet."""
        with self._lock:
            return len(self._awaited)

    def _watch(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._stop.wait(POLL_INTERVAL_S):
                with self._lock:
                    awaited = list(self._awaited)
                if not awaited:
                    continue
                seen = connection.execute(SEEN, (awaited,)).fetchall()
                now_s = time.monotonic()
                with self._lock:
                    self.latencies_s += [now_s - self._awaited.pop(found) for (found,) in seen]
