"""Customers who book over real HTTP, as real ones do: they collide, change their minds, retry.

Every POST of a booking carries an Idempotency-Key and is repeated with it when no answer came, so
what the service told them is the truth that everything else must agree with.
"""

import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
import jwt

ATTEMPTS = 6
REQUEST_TIMEOUT_S = 15.0
TOKEN_TTL_S = 3_600
RETRYABLE = frozenset({429, 503})
# What customers do, out of 100: book at once; hold and confirm; hold and cancel; book and cancel;
# hold and keep; hold where holds run out quickly, and forget.
BEHAVIOURS = (
    ("book", 64),
    ("hold_and_confirm", 14),
    ("hold_and_cancel", 6),
    ("book_and_cancel", 6),
    ("hold", 5),
    ("forget", 5),
)


class UnexpectedAnswerError(Exception):
    """The service answered something that no customer should see."""


@dataclass(slots=True)
class Told:
    """What the service told its customers. Shared by threads; use under `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    status_by_reservation: dict[str, str] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    answers: Counter[int] = field(default_factory=Counter)
    booking_s: list[float] = field(default_factory=list)

    def statuses(self) -> Counter[str]:
        """Count the reservations by what became of them; forgotten holds expire."""
        return Counter(
            "expired" if reservation in self.forgotten else status
            for reservation, status in self.status_by_reservation.items()
        )


class Customers:
    """Books `wanted` reservations with `threads` clients at once.

    Args:
        base_url: the service.
        impatient_url: a service on the same database whose holds run out within seconds.
        secret_key: signs the customers' tokens, as an identity provider would.
        seats_by_performance: seat ids on sale; customers pick from them without looking first.
        on_booked: called with each new reservation's id, from many threads.
    """

    def __init__(
        self,
        base_url: str,
        impatient_url: str,
        *,
        secret_key: str,
        seats_by_performance: dict[int, list[int]],
        on_booked: Callable[[str], None],
        seed: int = 1,
    ) -> None:
        self._base_url = base_url
        self._impatient_url = impatient_url
        self._secret_key = secret_key
        self.seats_by_performance = seats_by_performance
        self._on_booked = on_booked
        self._seed = seed
        self.told = Told()
        self._failures: list[Exception] = []

    def rush(self, performance_id: int, seat_id: int, customers: int) -> int:
        """Let many customers book the same seat at once; return how many got it."""
        before = len(self.told.status_by_reservation)
        start = threading.Barrier(customers)

        def claim(number: int, client: httpx.Client) -> None:
            start.wait(REQUEST_TIMEOUT_S)
            self._book(client, f"rush-{number}", performance_id, [seat_id], confirm=True)

        self._in_threads(customers, claim)
        return len(self.told.status_by_reservation) - before

    def book(self, wanted: int, threads: int) -> None:
        """Book until `wanted` reservations were made in all.

        Raises:
            UnexpectedAnswerError: a customer saw what no customer should see.
        """

        def live(number: int, client: httpx.Client) -> None:
            chance = random.Random(self._seed * 1_000 + number)  # noqa: S311 - no secret
            while len(self.told.status_by_reservation) < wanted and not self._failures:
                customer = f"customer-{number}-{chance.randint(1, 50)}"
                performance_id, on_sale = self._choose(chance)
                seats = chance.sample(on_sale, min(chance.randint(1, 3), len(on_sale)))
                behaviour = chance.choices(*zip(*BEHAVIOURS, strict=True))[0]
                self._behave(client, behaviour, customer, performance_id, seats)

        self._in_threads(threads, live)

    def _choose(self, chance: random.Random) -> tuple[int, list[int]]:
        """Return a performance and the seats that look free there, the emptiest likeliest."""
        with self.told.lock:
            free = {name: seats for name, seats in self.seats_by_performance.items() if seats}
        if not free:
            raise UnexpectedAnswerError("every seat is sold; ask for fewer reservations")
        weights = [len(seats) for seats in free.values()]
        return chance.choices(list(free.items()), weights)[0]

    def _learn(self, performance_id: int, unavailable: Sequence[int]) -> None:
        """Strike seats off the map, as a customer does who was told that they are gone."""
        with self.told.lock:
            seats = self.seats_by_performance[performance_id]
            gone = set(unavailable)
            self.seats_by_performance[performance_id] = [seat for seat in seats if seat not in gone]

    def _behave(
        self,
        client: httpx.Client,
        behaviour: str,
        customer: str,
        performance_id: int,
        seats: Sequence[int],
    ) -> None:
        confirm = behaviour in {"book", "book_and_cancel"}
        impatient = behaviour == "forget"
        reservation_id = self._book(
            client, customer, performance_id, seats, confirm=confirm, impatient=impatient
        )
        if reservation_id is None:
            return
        if behaviour == "hold_and_confirm":
            self._change(client, customer, reservation_id, "confirm")
        elif behaviour in {"hold_and_cancel", "book_and_cancel"}:
            self._change(client, customer, reservation_id, "cancel")

    def _book(
        self,
        client: httpx.Client,
        customer: str,
        performance_id: int,
        seats: Sequence[int],
        *,
        confirm: bool,
        impatient: bool = False,
    ) -> str | None:
        """Book seats; return the reservation's id, or None when somebody was quicker."""
        began_s = time.monotonic()
        answer = self._post(
            client,
            (self._impatient_url if impatient else self._base_url) + "/api/reservations",
            customer,
            {"performance_id": performance_id, "seat_ids": list(seats), "confirm": confirm},
        )
        if answer.status_code == 409:
            self._learn(performance_id, answer.json()["unavailable_seats"])
            return None
        if answer.status_code != 201:
            raise UnexpectedAnswerError(f"booking: {answer.status_code} {answer.text[:200]}")
        reservation_id = str(answer.json()["reservation_id"])
        with self.told.lock:
            self.told.booking_s.append(time.monotonic() - began_s)
            self.told.status_by_reservation[reservation_id] = answer.json()["status"]
            if impatient:
                self.told.forgotten.add(reservation_id)
        self._learn(performance_id, seats)
        self._on_booked(reservation_id)
        return reservation_id

    def _change(
        self, client: httpx.Client, customer: str, reservation_id: str, action: str
    ) -> None:
        url = f"{self._base_url}/api/reservations/{reservation_id}/{action}"
        answer = self._post(client, url, customer, None)
        if answer.status_code != 200:
            raise UnexpectedAnswerError(f"{action}: {answer.status_code} {answer.text[:200]}")
        with self.told.lock:
            self.told.status_by_reservation[reservation_id] = answer.json()["status"]

    def _post(
        self, client: httpx.Client, url: str, customer: str, body: dict[str, Any] | None
    ) -> httpx.Response:
        """POST until there is an answer; the key makes the repetition harmless."""
        headers = {
            "Authorization": f"Bearer {self._token(customer)}",
            "Idempotency-Key": str(uuid4()),
        }
        last: Exception | None = None
        for _ in range(ATTEMPTS):
            try:
                answer = client.post(url, json=body, headers=headers)
            except httpx.TransportError as error:
                last = error
                continue
            with self.told.lock:
                self.told.answers[answer.status_code] += 1
            if answer.status_code not in RETRYABLE:
                return answer
            last = UnexpectedAnswerError(f"{answer.status_code} {answer.text[:200]}")
        raise UnexpectedAnswerError(f"no answer after {ATTEMPTS} attempts: {last!r}")

    def _token(self, customer: str) -> str:
        claims = {
            "aud": "reservation-service",
            "sub": customer,
            "exp": int(time.time()) + TOKEN_TTL_S,
        }
        return jwt.encode(claims, self._secret_key, algorithm="HS256")

    def _in_threads(self, count: int, live: Callable[[int, httpx.Client], None]) -> None:
        # Made once: each client's own would take longer than its bookings.
        tls = ssl.create_default_context()

        def run(number: int) -> None:
            try:
                with httpx.Client(timeout=REQUEST_TIMEOUT_S, verify=tls) as client:
                    live(number, client)
            except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
                self._failures.append(error)

        threads = [
            threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]
