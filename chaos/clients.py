"""Clients who book over HTTP as real ones do: they collide, change their minds, and never give up.

No answer, or one that asks for patience, is answered by the same call at the other service; a
booking keeps its Idempotency-Key over all of its repetitions. Changes need none: what has taken
effect already is told again.
"""

import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from uuid import UUID

import httpx
import jwt

from chaos.ledger import Ledger

REQUEST_TIMEOUT_S = 4.0
CONNECT_TIMEOUT_S = 1.0
# Longer than any fault: who has no answer by then has found a fault of ours.
PATIENCE_S = 150.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
# Clocks are set forward by an hour at most: tokens outlast that.
TOKEN_TTL_S = 6 * 3_600
JOIN_TIMEOUT_S = PATIENCE_S + 30
# Out of 100; `forget` holds and lets the hold run out.
BEHAVIOURS = (
    ("book", 45),
    ("hold confirm", 15),
    ("hold extend confirm", 8),
    ("hold cancel", 8),
    ("book cancel", 12),
    ("hold", 12),
)
BEST_AVAILABLE = 0.1
# So often seats are wanted that others want, too.
HOT, HOT_SEATS = 0.15, 40


class Clients:
    """Some threads that book at `rate` a second together until told to stop.

    Args:
        services: base URL by the service's name.
        secret_key: signs the clients' tokens, as an identity provider would.
        seats: seat ids on sale by performance.
        ledger: where answers are taken down.
        threads: how many.
        rate: behaviours a second of all of them, where everything answers.
        seed: decides who wants what.
    """

    def __init__(
        self,
        services: Mapping[str, str],
        *,
        secret_key: str,
        seats: Mapping[int, Sequence[int]],
        ledger: Ledger,
        threads: int,
        rate: float,
        seed: int,
    ) -> None:
        self._services = list(services.items())
        self._secret_key = secret_key
        self._seats = list(seats.items())
        self._ledger = ledger
        self._pause_s = threads / rate
        self._seed = seed
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._live, args=(number,), daemon=True, name=f"client {number}"
            )
            for number in range(threads)
        ]

    @contextmanager
    def booking(self) -> Iterator[None]:
        """Book while the block runs; behind it every call has its answer."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Let each client finish what it is about."""
        self._stop.set()
        until_s = time.monotonic() + JOIN_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
            if thread.is_alive():
                self._ledger.surprised(f"{thread.name} has no answer after {JOIN_TIMEOUT_S:g} s")

    def _live(self, number: int) -> None:
        chance = random.Random(f"client {self._seed} {number}")  # noqa: S311 - no secret
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        with httpx.Client(timeout=timeout) as http:
            client = _Client(
                http,
                self._services,
                self._ledger,
                customer_id=f"client-{number}",
                token=self._token(f"client-{number}"),
                chance=chance,
            )
            while not self._stop.is_set():
                hot = chance.random() < HOT
                performance_id, seats = self._seats[0] if hot else chance.choice(self._seats)
                wanted = chance.sample(seats[:HOT_SEATS] if hot else seats, chance.randint(1, 3))
                (behaviour,) = chance.choices(*zip(*BEHAVIOURS, strict=True))
                try:
                    client.behave(behaviour.split(), performance_id, wanted)
                except Exception as error:  # noqa: BLE001 - told by the audit; others go on
                    self._ledger.surprised(f"{behaviour}: {error!r}")
                self._stop.wait(chance.expovariate(1 / self._pause_s))

    def _token(self, customer_id: str) -> str:
        claims = {
            "aud": "reservation-service",
            "sub": customer_id,
            "exp": int(time.time()) + TOKEN_TTL_S,
        }
        return jwt.encode(claims, self._secret_key, algorithm="HS256")


class _Client:
    """One of them, in a thread of its own."""

    def __init__(
        self,
        http: httpx.Client,
        services: Sequence[tuple[str, str]],
        ledger: Ledger,
        *,
        customer_id: str,
        token: str,
        chance: random.Random,
    ) -> None:
        self._http = http
        self._services = services
        self._ledger = ledger
        self._customer_id = customer_id
        self._token = token
        self._chance = chance
        # Of its own: how often an answer is missing must not change what is wanted later.
        self._pauses = random.Random(customer_id)  # noqa: S311 - no secret
        self._at = 0

    def behave(self, steps: Sequence[str], performance_id: int, seats: Sequence[int]) -> None:
        """Reserve, then do what the further steps say; begin at any service, as it may be well."""
        self._at = self._chance.randrange(len(self._services))
        confirm = steps[0] == "book"
        if best := self._chance.random() < BEST_AVAILABLE:
            path = f"/api/performances/{performance_id}/best-available"
            body: dict[str, Any] = {"count": len(seats), "confirm": confirm}
        else:
            path = "/api/reservations"
            body = {"performance_id": performance_id, "seat_ids": seats, "confirm": confirm}
        key = str(UUID(int=self._chance.getrandbits(128)))
        status, answer = self._ask(path, body, key)
        if status == 409 and answer["type"] == "seats-unavailable":
            return
        if status != 201:
            self._ledger.surprised(f"{path}: {status} {answer}")
            return
        asked = () if best else seats
        self._ledger.booked(answer, self._customer_id, performance_id, asked)
        for step in steps[1:]:
            self._change(answer["reservation_id"], step)

    def _change(self, reservation_id: str, action: str) -> None:
        status, answer = self._ask(f"/api/reservations/{reservation_id}/{action}", None, None)
        if status == 200:
            self._ledger.reserved(answer)
        elif status != 409 or answer["status"] != "expired" or self._held(reservation_id):
            self._ledger.surprised(f"{action} of {reservation_id}: {status} {answer}")

    def _held(self, reservation_id: str) -> bool:
        """Whether a hold that was told lasts still: the decision was earlier than now."""
        until = self._ledger.told[reservation_id].held_until
        return until is not None and datetime.now(UTC) < until

    def _ask(
        self, path: str, body: dict[str, Any] | None, key: str | None
    ) -> tuple[int, dict[str, Any]]:
        """POST until there is an answer, at one service and then at the other."""
        headers = {"Authorization": f"Bearer {self._token}"}
        if key is not None:
            headers["Idempotency-Key"] = key
        until_s, pause_s = time.monotonic() + PATIENCE_S, FIRST_PAUSE_S
        while time.monotonic() < until_s:
            service, base_url = self._services[self._at % len(self._services)]
            with suppress(httpx.TransportError):
                answer = self._http.post(base_url + path, json=body, headers=headers)
                found = _json_of(answer)
                if answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
                    self._ledger.surprised(f"{path}: {answer.status_code} {answer.text}")
                elif found and not _asks_for_patience(answer.status_code, found):
                    self._ledger.answered(service, answer.status_code)
                    return answer.status_code, found
            self._ledger.retried()
            self._at += 1
            time.sleep(pause_s * self._pauses.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise TimeoutError(f"no answer to {path} in {PATIENCE_S:g} s")


def _json_of(answer: httpx.Response) -> dict[str, Any]:
    """Return what an answer says; nothing where it broke off, or somebody else gave it."""
    try:
        found: dict[str, Any] = answer.json()
    except ValueError:
        return {}
    return found


def _asks_for_patience(status: int, answer: Mapping[str, Any]) -> bool:
    return status in {429, 503} or answer.get("type") == "request-in-flight"
