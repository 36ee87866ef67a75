"""The service under load: a hall to sell, the service or a variant of it, and its customers."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psycopg

from benchmarks.bookers import HOST, Spec
from benchmarks.processes import cost
from benchmarks.results import Figure
from benchmarks.surroundings import Surroundings
from devstack.processes import DevstackError, Process, succeed
from devstack.state import free_port

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 12.0
LOAD_MARGIN_S = 90.0
READY_TIMEOUT_S = 2.0
MICROSECONDS = 1e6
WORKERS = 2
SEATS_PER_ROW, ROWS_PER_BLOCK = 50, 20

# As `POST /api/concerts` would make it, but of any size and without an event.
MAKE_HALL = """
WITH concert AS (
    INSERT INTO concerts (title, venue, time_zone, currency)
    VALUES ('Northern Lights Tour', 'Harbour Arena, Hamburg', 'Europe/Berlin', 'EUR')
    RETURNING concert_id
), performance AS (
    INSERT INTO performances (concert_id, starts_at, sales_open_at, sales_close_at, capacity)
    SELECT concert_id, now() + interval '30 days', now() - interval '1 day',
        now() + interval '29 days', %(seats)s
    FROM concert RETURNING performance_id
), seat AS (
    INSERT INTO seats (performance_id, section, "row", number, price)
    SELECT performance_id, 'Block ' || n / %(block)s, 'Row ' || n / %(row)s %% %(rows)s,
        1 + n %% %(row)s, 8950
    FROM performance, generate_series(0, %(seats)s - 1) AS n
    RETURNING performance_id, seat_id
)
SELECT performance_id, min(seat_id) FROM seat GROUP BY performance_id
"""
EMPTY = "TRUNCATE outbox, reservations, reservation_seats, idempotency_keys"
SETTLE = ("VACUUM (ANALYZE) seats", "CHECKPOINT")


@dataclass
class Hall:
    """A performance whose seats have consecutive ids; `taken` of them have been given out."""

    performance_id: int
    first_seat_id: int
    seats: int
    taken: int = 0

    def take(self, count: int) -> int:
        """Return the first of `count` seats that nobody was given before."""
        if self.taken + count > self.seats:
            raise DevstackError(f"a hall of {self.seats:,} seats is too small for this load")
        first, self.taken = self.first_seat_id + self.taken, self.taken + count
        return first


@dataclass(frozen=True)
class Shop:
    """A service that runs."""

    around: Surroundings
    process: Process
    port: int

    def load(self, what: str, **settings: Any) -> Figure:
        """Let customers come (see `bookers.Spec`); return their figures and what they cost."""
        secret_key = self.around.stack.environment["RESERVATION_SECRET_KEY"]
        spec = Spec(what, self.port, secret_key, **settings)
        groups = {"service": self.process.pid, "postgres": self.around.server_pids()["postgres"]}
        log = self.around.stack.run.path / "bookers.log"
        log.unlink(missing_ok=True)
        before = cost(groups)
        customers = self.around.program(
            "benchmarks.bookers", json.dumps(asdict(spec)), name="bookers"
        )
        succeed(customers, spec.seconds + LOAD_MARGIN_S)
        used = cost(groups).since(before)
        figure: Figure = json.loads(log.read_text("utf-8").splitlines()[-1])
        count = max(1, sum(figure["answers"].values()))
        return figure | {
            f"{name}_cpu_us": round(seconds / count * MICROSECONDS, 1)
            for name, seconds in used.items()
        }

    def book(self, hall: Hall, *, at_most: int, **settings: Any) -> Figure:
        """Let customers book seats one by one, `at_most` so many.

        Raises:
            DevstackError: somebody was answered otherwise than with a booking.
        """
        first = hall.take(at_most)
        place = {"performance_id": hall.performance_id, "first_seat_id": first, "seats": at_most}
        return self.load("book", **place, **settings)


def make_hall(owner_url: str, seats: int) -> Hall:
    """Put a performance on sale that has so many seats."""
    sizes = {
        "seats": seats,
        "row": SEATS_PER_ROW,
        "rows": ROWS_PER_BLOCK,
        "block": SEATS_PER_ROW * ROWS_PER_BLOCK,
    }
    with psycopg.connect(owner_url) as connection:
        found = connection.execute(MAKE_HALL, sizes).fetchone()
    assert found  # noqa: S101 - seats were made
    return Hall(found[0], found[1], seats)


def settle(admin_url: str) -> None:
    """Leave nothing to do for whoever books first."""
    with psycopg.connect(admin_url, autocommit=True) as connection:
        for statement in SETTLE:
            connection.execute(statement)


@contextmanager
def own_outbox(around: Surroundings) -> Iterator[None]:
    """Begin with an empty outbox and leave one: relays of other sections never see our events."""
    _empty(around.owner_url)
    try:
        yield
    finally:
        _empty(around.owner_url)


@contextmanager
def shop(
    around: Surroundings,
    variant: str = "",
    *,
    workers: int = WORKERS,
    env: Mapping[str, str] | None = None,
) -> Iterator[Shop]:
    """Run `reservation-service serve`, or a variant of it, until the block ends.

    Raises:
        DevstackError: it ended by itself, or not with exit code 0.
    """
    port = free_port()
    name = f"service-{variant or 'ours'}-{port}"
    program = ("benchmarks.variants", variant) if variant else ("reservation_service",)
    process = around.program(
        *program, "serve", "--port", str(port), "--workers", str(workers), name=name, env=env
    )
    try:
        process.wait_ready(lambda: _is_ready(port), START_TIMEOUT_S)
        yield Shop(around, process, port)
    finally:
        code = process.stop(STOP_TIMEOUT_S)
    if code:
        raise DevstackError(f"{name} ended with code {code}\n{process.log_tail()}")


def _empty(owner_url: str) -> None:
    with psycopg.connect(owner_url) as connection:
        connection.execute(EMPTY)


def _is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://{HOST}:{port}/readyz", timeout=READY_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
