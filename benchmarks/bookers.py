"""`python -m benchmarks.bookers SPEC`: customers of a running service; prints what became of them.

A process of its own, so that what the load costs is told apart from what the service costs.
"""

import json
import random
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from benchmarks.crowd import NO_ANSWER, NOTHING, Answer, Client, Crowd, Due, at_once, request
from benchmarks.latency import quantiles
from reservation_service.callers import make_token

CUSTOMERS = 500
TOKEN_TTL_S = 7_200
ANSWER_TIMEOUT_S = 30.0
HOST = "127.0.0.1"
GZIP = 31  # zlib's number for it
# A fan who was told so often that others were quicker looks at the plan anew.
REFUSALS_UNTIL_LOOKING = 3


@dataclass(frozen=True)
class Spec:
    """What is to be done.

    Attributes:
        what: `empty` asks /healthz; `book` books a seat in one step with an Idempotency-Key; `plan`
            reads the seats of the performance, `plan-again` with the ETag that it has; `rush` wants
            one seat, on `lines` new connections at once; `fans` come within `seconds`, `lines` of
            them, look at the plan, hold one or two seats that are free there, and confirm.
        lines: as many connections at once (closed loop), or at most (open loop).
        rate: so many requests a second at random moments, whether or not they are answered (open
            loop); None: each connection asks again when it has its answer (closed loop).
        first_seat_id: the first of the seats to be booked, one a request, never the same again.
    """

    what: str
    port: int
    secret_key: str
    lines: int
    seconds: float
    rate: float | None = None
    performance_id: int = 0
    first_seat_id: int = 0
    seats: int = 0
    keep_latencies: bool = False


@dataclass
class Told:
    """What the customers were answered."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    newest: Answer = NOTHING

    def note(self, answer: Answer) -> None:
        """Take an answer."""
        self.newest = answer
        self.statuses[answer.status] += 1
        self.seconds.append(answer.seconds)
        if answer.status >= 400 or answer.status == NO_ANSWER:
            self.refusals[answer.body.decode(errors="replace")[:120]] += 1


class Seat(msgspec.Struct):
    """What a fan looks at in the plan."""

    seat_id: int
    status: str


class Plan(msgspec.Struct):
    """The answer to a GET of the seats."""

    seats: list[Seat]


def run(spec: Spec) -> dict[str, Any]:
    """Do it and return the figures."""
    told = Told()
    arrivals = iter(_arrivals(spec, told))
    crowd = Crowd((HOST, spec.port), spec.lines)
    began_cpu_s = time.process_time()
    elapsed_s = crowd.run(arrivals, spec.seconds + ANSWER_TIMEOUT_S)
    used_cpu_s = time.process_time() - began_cpu_s
    answered = sum(count for status, count in told.statuses.items() if status != NO_ANSWER)
    return {
        "answers": {str(status): count for status, count in sorted(told.statuses.items())},
        "ends": dict(told.ends),
        "seconds": round(elapsed_s, 2),
        "per_s": round(answered / elapsed_s, 1),
        "load_cpu_us": round(used_cpu_s / max(1, answered) * 1e6, 1),
        "body_bytes": len(told.newest.body),
        "refusals": dict(told.refusals.most_common(3)),
        "latencies_ms": [round(s * 1e3, 2) for s in told.seconds] if spec.keep_latencies else [],
    } | (quantiles(told.seconds) if told.seconds else {})


def _arrivals(spec: Spec, told: Told) -> Iterator[Due]:
    if spec.what == "fans":
        return _fans(spec, told)
    requests = REQUESTS[spec.what](spec, told)
    if spec.what == "rush":
        return at_once(_once(requests, told) for _ in range(spec.lines))
    return _open(spec, requests, told) if spec.rate else _closed(spec, requests, told)


def _closed(spec: Spec, requests: Iterator[bytes], told: Told) -> Iterator[Due]:
    ends_at = time.monotonic() + spec.seconds

    def client() -> Client:
        while time.monotonic() < ends_at:
            told.note((yield next(requests)))

    return at_once(client() for _ in range(spec.lines))


def _open(spec: Spec, requests: Iterator[bytes], told: Told) -> Iterator[Due]:
    dice = random.Random(1)  # noqa: S311 - moments, not secrets
    at_s = 0.0
    while (at_s := at_s + dice.expovariate(spec.rate or 1.0)) < spec.seconds:
        yield Due(at_s, _once(requests, told))


def _once(requests: Iterator[bytes], told: Told) -> Client:
    told.note((yield next(requests)))


# ---- what is asked


def _empty(_spec: Spec, _told: Told) -> Iterator[bytes]:
    while True:
        yield request("GET", "/healthz", {})


def _bookings(spec: Spec, _: Told) -> Iterator[bytes]:
    customers, run_id = _customers(spec), random.randbytes(8).hex()  # noqa: S311 - no secret
    for number in range(spec.seats):
        headers = customers[number % CUSTOMERS] | {"Idempotency-Key": f"{run_id}-{number}"}
        body = _order(spec, [spec.first_seat_id + number], confirm=True)
        yield request("POST", "/api/reservations", headers, body)
    raise RuntimeError("all seats are booked: the hall was too small for this load")


def _rush(spec: Spec, _: Told) -> Iterator[bytes]:
    customers, body = _customers(spec), _order(spec, [spec.first_seat_id], confirm=True)
    for number in range(spec.lines):
        headers = customers[number % CUSTOMERS]
        yield request("POST", "/api/reservations", headers, body)


def _plans(spec: Spec, _: Told) -> Iterator[bytes]:
    while True:
        yield _plan(spec)


def _plans_again(spec: Spec, told: Told) -> Iterator[bytes]:
    yield _plan(spec)
    etag = ""
    while True:
        etag = etag or _header(told.newest, b"etag")
        yield _plan(spec, etag)


def _plan(spec: Spec, etag: str = "") -> bytes:
    headers = {"Accept-Encoding": "gzip"} | ({"If-None-Match": etag} if etag else {})
    return request("GET", f"/api/performances/{spec.performance_id}/seats", headers)


def _customers(spec: Spec) -> list[dict[str, str]]:
    tokens = [make_token(f"c{n}", spec.secret_key, TOKEN_TTL_S) for n in range(CUSTOMERS)]
    return [{"Authorization": f"Bearer {token}"} for token in tokens]


def _order(spec: Spec, seat_ids: list[int], *, confirm: bool) -> str:
    order = {"performance_id": spec.performance_id, "seat_ids": seat_ids, "confirm": confirm}
    return msgspec.json.encode(order).decode()


def _header(answer: Answer, name: bytes) -> str:
    for line in answer.head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip().decode()
    return ""


REQUESTS = {
    "empty": _empty,
    "book": _bookings,
    "rush": _rush,
    "plan": _plans,
    "plan-again": _plans_again,
}


# ---- an on-sale


def _fans(spec: Spec, told: Told) -> Iterator[Due]:
    customers, dice = _customers(spec), random.Random(1)  # noqa: S311 - behaviour, no secret
    for at_s in sorted(dice.uniform(0, spec.seconds) for _ in range(spec.lines)):
        yield Due(at_s, _fan(spec, told, dice, customers[dice.randrange(CUSTOMERS)]))


def _fan(spec: Spec, told: Told, dice: random.Random, headers: dict[str, str]) -> Client:
    """Look, try until it works or all is sold, confirm. What came of it is told in `ends`."""
    wanted = dice.choice((1, 2))
    refused = REFUSALS_UNTIL_LOOKING
    free: set[int] = set()
    while True:
        if refused == REFUSALS_UNTIL_LOOKING:
            free, refused = (yield from _look(spec, told)), 0
        if len(free) < wanted:
            told.ends["sold out"] += 1
            return
        order = _order(spec, dice.sample(sorted(free), wanted), confirm=False)
        answer = yield request("POST", "/api/reservations", headers, order)
        told.note(answer)
        if answer.status == 201:
            break
        if answer.status != 409:
            told.ends["failed"] += 1
            return
        free -= set(msgspec.json.decode(answer.body)["unavailable_seats"])
        refused += 1
    path = f"/api/reservations/{msgspec.json.decode(answer.body)['reservation_id']}/confirm"
    answer = yield request("POST", path, headers)
    told.note(answer)
    told.ends["booked" if answer.status == 200 else "failed"] += 1
    told.ends["seats booked"] += wanted if answer.status == 200 else 0


def _look(spec: Spec, told: Told) -> Generator[bytes, Answer, set[int]]:
    answer = yield _plan(spec)
    told.note(answer)
    if answer.status != 200:
        return set()
    gzipped = _header(answer, b"content-encoding") == "gzip"
    body = zlib.decompress(answer.body, GZIP) if gzipped else answer.body
    plan = msgspec.json.decode(body, type=Plan)
    return {seat.seat_id for seat in plan.seats if seat.status == "available"}


if __name__ == "__main__":
    # A crowd has more connections than a process may have files by default.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    print(json.dumps(run(Spec(**json.loads(sys.argv[1])))))
