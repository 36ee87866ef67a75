"""What clients were told: the truth that every other place has to agree with.

A client who was told that seats are his has them; one who was told nothing asks again with the same
key until he is told. So behind a run there is an answer to each booking, and no reservation of
which nobody knows.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Told:
    """What a client knows of a reservation: its seats, and its status by version."""

    performance_id: int
    seat_ids: frozenset[int]
    statuses: dict[int, str]

    @property
    def version(self) -> int:
        """The newest version that was told."""
        return max(self.statuses)

    @property
    def final_status(self) -> str:
        """What it must be once every hold has run out."""
        status = self.statuses[self.version]
        return "expired" if status == "held" else status


@dataclass
class Ledger:
    """Taken down by many clients at once.

    Attributes:
        unexpected: answers that no client should get, each in words.
        answered_s: monotonic times at which each service answered a write, in order.
    """

    told: dict[str, Told] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    answered_s: dict[str, list[float]] = field(default_factory=dict)
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reserved(self, answer: dict[str, Any]) -> None:
        """Take down the state of a reservation as an answer has it."""
        name, version, status = answer["reservation_id"], answer["version"], answer["status"]
        seats = frozenset(seat["seat_id"] for seat in answer["seats"])
        with self._lock:
            told = self.told.setdefault(name, Told(answer["performance_id"], seats, {}))
            before = told.statuses.setdefault(version, status)
        if before != status or told.seat_ids != seats:
            self.surprised(f"{name}: version {version} was {before}, is {status}")

    def answered(self, service: str, status: int) -> None:
        """Take down that a service has answered a write."""
        with self._lock:
            self.answers[str(status)] += 1
            self.answered_s.setdefault(service, []).append(time.monotonic())

    def retried(self) -> None:
        """Take down that a call had to be repeated."""
        with self._lock:
            self.retries += 1

    def surprised(self, what: str) -> None:
        """Take down what no client should see."""
        with self._lock:
            self.unexpected.append(what)

    def first_answer_after(self, service: str, at_s: float) -> float | None:
        """When a service answered first behind `at_s`; None: not any more."""
        with self._lock:
            times = self.answered_s.get(service, [])
            place = bisect_left(times, at_s)
            return times[place] if place < len(times) else None
