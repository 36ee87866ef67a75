"""Customers who don't give up: each booking is repeated, with its key, until it is answered."""

import itertools
import threading
import time
from typing import Self
from uuid import uuid4

import httpx
import jwt

from devstack.processes import DevstackError, wait_until

THREADS = 4
BOOKINGS_PER_S = 15.0
# For a reboot, and for a Postgres that is away; of each booking, all attempts together.
PATIENCE_S = 120.0
REQUEST_TIMEOUT_S = 10.0
RETRY_INTERVAL_S = 0.2
MORE_TIMEOUT_S = 180.0


class Load:
    """Books a seat each time, at a steady rate, until stopped; a context manager.

    Attributes:
        told: ids of the reservations that customers were told are theirs.
        worst_s: the longest that a customer waited for an answer.
        refused: connections that nobody took.
    """

    def __init__(
        self, base_url: str, secret_key: str, performance_id: int, seats: list[int]
    ) -> None:
        self._base_url = base_url
        self._performance_id = performance_id
        self._seats = iter(seats)
        claims = {"aud": "reservation-service", "sub": "patient", "exp": int(time.time()) + 7_200}
        token = jwt.encode(claims, secret_key, algorithm="HS256")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self._threads = [threading.Thread(target=self._live) for _ in range(THREADS)]
        self.told: list[str] = []
        self.worst_s = 0.0
        self.refused = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """End it; every booking that was begun is answered."""
        self._stopping.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def count(self) -> int:
        """Bookings so far.

        Raises:
            DevstackError: a customer saw what no customer should see.
        """
        if self._failure:
            raise DevstackError(f"a customer: {self._failure!r}") from self._failure
        return len(self.told)

    def go_on(self, bookings: int) -> None:
        """Wait until so many more were made."""
        goal = self.count() + bookings
        wait_until(lambda: self.count() >= goal, MORE_TIMEOUT_S, f"{bookings} more bookings")

    def hold(self) -> str:
        """Hold a seat and leave it; return the reservation's id."""
        with httpx.Client() as client:
            return self._book(client, confirm=False)

    def _live(self) -> None:
        try:
            with httpx.Client() as client:
                while not self._stopping.wait(THREADS / BOOKINGS_PER_S):
                    began_s = time.monotonic()
                    reservation_id = self._book(client, confirm=True)
                    with self._lock:
                        self.told.append(reservation_id)
                        self.worst_s = max(self.worst_s, time.monotonic() - began_s)
        except Exception as error:  # noqa: BLE001 - raised in `count`
            self._failure = error

    def _book(self, client: httpx.Client, *, confirm: bool) -> str:
        with self._lock:
            seat = next(self._seats)
        body = {"performance_id": self._performance_id, "seat_ids": [seat], "confirm": confirm}
        headers = self._headers | {"Idempotency-Key": str(uuid4())}
        last: object = None
        deadline_s = time.monotonic() + PATIENCE_S
        for attempt in itertools.count():
            if attempt:
                threading.Event().wait(RETRY_INTERVAL_S)
            if time.monotonic() > deadline_s:
                break
            try:
                answer = client.post(
                    f"{self._base_url}/api/reservations",
                    json=body, headers=headers, timeout=REQUEST_TIMEOUT_S,
                )  # fmt: skip
            except httpx.TransportError as error:
                last = error
                with self._lock:
                    self.refused += isinstance(error, httpx.ConnectError)
                continue
            last = f"{answer.status_code} {answer.text[:200]}"
            if answer.status_code == 201:
                return str(answer.json()["reservation_id"])
            if answer.status_code not in {409, 503} or "Retry-After" not in answer.headers:
                break
        raise DevstackError(f"booking: {last!r}")
