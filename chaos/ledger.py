"""What clients were told: the truth that every other place has to agree with.

A client who was told that seats are his has them; one who was told nothing asks again with the same
key until he is told. So behind a run there is an answer to each booking, and no reservation of
which nobody knows.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple


class Order(NamedTuple):
    """What a reservation is, whatever becomes of it; a seat is its id and its price."""

    customer_id: str
    performance_id: int
    amount: int
    currency: str
    seats: frozenset[tuple[int, int]]


@dataclass(slots=True)
class Told:
    """What a client knows of a reservation: what it is, its status by version, its last hold."""

    order: Order
    statuses: dict[int, str]
    held_until: datetime | None = None

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

    def booked(
        self, answer: dict[str, Any], customer_id: str, performance_id: int, seats: Collection[int]
    ) -> None:
        """Take a 201 down, and compare it with what was asked for; no `seats`: any would do."""
        name = answer["reservation_id"]
        with self._lock:
            known = name in self.told
        if known:  # each booking is told once: it keeps its key until it is
            self.surprised(f"{name}: told to two bookings")
        self.reserved(answer)
        order = self.told[name].order
        if (order.customer_id, order.performance_id) != (customer_id, performance_id) or (
            seats and {seat for seat, _ in order.seats} != set(seats)
        ):
            self.surprised(f"{name}: {customer_id} wanted {performance_id} {seats}, got {order}")

    def reserved(self, answer: dict[str, Any]) -> None:
        """Take down the state of a reservation as an answer has it."""
        name, version, status = answer["reservation_id"], answer["version"], answer["status"]
        until = answer["expires_at"]
        seats = frozenset((seat["seat_id"], seat["price"]) for seat in answer["seats"])
        whose, performance_id = answer["customer_id"], answer["performance_id"]
        order = Order(whose, performance_id, answer["amount"], answer["currency"], seats)
        with self._lock:
            told = self.told.setdefault(name, Told(order, {}))
            before = told.statuses.setdefault(version, status)
            told.held_until = datetime.fromisoformat(until) if until else None
        if before != status or told.order != order:
            was = f"{before} {told.order}"
            self.surprised(f"{name}: version {version} was {was}, is {status} {order}")

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
