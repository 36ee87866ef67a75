"""Book the best seats that are free: chosen here, booked by `booking.book` like any others.

What is best, in this order:
1. Side by side (consecutive numbers of one row); where that is impossible, in as few pieces as
   possible.
2. In the section that the plan names first.
3. In front and in the middle: a row further back counts as much as two seats off the row's centre.

Guarantees:
- The choice only proposes; the booking's transaction decides. Two never get the same seat.
- Those who choose at the same time are proposed different seats: each announces his own by advisory
  locks. They are tried, never waited for, so nobody can be deadlocked by them.
- It is refused for want of seats only when fewer than wanted are free. Where the last free ones are
  merely in somebody's hands it waits for them, as any booking does.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import NamedTuple

import psycopg

from reservation_service import booking, catalogue, idempotency, problems, sql
from reservation_service.booking import Order, Terms
from reservation_service.database import Connection, transaction
from reservation_service.idempotency import Answer, Key
from reservation_service.problems import Problem

SEATS_OFF_CENTRE_PER_ROW = 2
GIVE_UP_AFTER_S = 3.0


class Wanted(NamedTuple):
    """What a customer wants: so many of the best seats, at least one."""

    customer_id: str
    performance_id: int
    seats: int
    confirm: bool


class Run(NamedTuple):
    """Free seats side by side; `centre` and `rows_behind` are where their row lies."""

    section: int
    rows_behind: int
    centre: float
    first_number: int
    seat_ids: list[int]

    def first_of(self, size: int) -> int:
        """Return where the `size` most central seats of this run begin."""
        ideal = int(self.centre - (size - 1) / 2) - self.first_number
        return min(max(ideal, 0), len(self.seat_ids) - size)

    def rank(self, size: int) -> tuple[int, float, int, int]:
        """Return how far from the best `size` seats of this run are; less is better."""
        number = self.first_number + self.first_of(size)
        off_centre = abs(number + (size - 1) / 2 - self.centre)
        off_best = off_centre + SEATS_OFF_CENTRE_PER_ROW * self.rows_behind
        return self.section, off_best, self.rows_behind, number


class Row(NamedTuple):
    """A row of the plan and what is free in it: (number, seat_id), by number."""

    section: int
    rows_behind: int
    centre: float
    free: list[tuple[int, int]]

    def runs(self, without: Collection[int]) -> Iterator[Run]:
        """Yield the free seats that lie side by side."""
        before, seat_ids = 0, list[int]()
        for number, seat_id in self.free:
            if seat_id in without:
                continue
            if number != before + 1 or not seat_ids:
                seat_ids = []
                yield Run(self.section, self.rows_behind, self.centre, number, seat_ids)
            seat_ids.append(seat_id)
            before = number


def book(
    connection: Connection,
    wanted: Wanted,
    terms: Terms,
    key: Key | None = None,
    traceparent: str | None = None,
) -> Answer:
    """Hold or reserve the best seats.

    Raises:
        Problem: as `booking.book`; 409 too when fewer than wanted are free; 503 when somebody else
            was quicker again and again.
        psycopg.OperationalError: as `booking.book`.
    """
    gives_up_at_s = time.monotonic() + GIVE_UP_AFTER_S
    rows = read_rows(connection, wanted.performance_id)
    not_these: set[int] = set()
    waits = False
    while time.monotonic() < gives_up_at_s:
        seat_ids = choose(rows, wanted.seats, not_these)
        if len(seat_ids) < wanted.seats:
            # What others had in hand is taken by now, or free again: look anew, then wait for it.
            rows, not_these, waits = read_rows(connection, wanted.performance_id), set(), True
            seat_ids = choose(rows, wanted.seats)
        if len(seat_ids) < wanted.seats:
            return _refuse(connection, wanted, len(seat_ids), key)
        with _announced(connection, seat_ids) as in_other_hands:
            if in_other_hands and not waits:
                not_these |= in_other_hands
                continue
            order = Order(wanted.customer_id, wanted.performance_id, seat_ids, wanted.confirm)
            try:
                return booking.book(connection, order, terms, key, traceparent)
            except Problem as problem:
                if problem.type != problems.SEATS_UNAVAILABLE:
                    raise
                not_these |= set(problem.members["unavailable_seats"])
    raise problems.unavailable("Too many want the best seats at once. Please try again.")


def read_rows(connection: Connection, performance_id: int) -> list[Row]:
    """Return the rows of the plan, in its order, with what is free at this moment."""
    wanted = {"performance_id": performance_id}
    rows: list[Row] = []
    rows_of: dict[str, int] = {}
    for section, lowest, highest, numbers, seat_ids in connection.execute(
        sql.READ_FREE_SEATS, wanted, binary=True
    ):
        behind = rows_of.get(section, 0)
        rows_of[section] = behind + 1
        position = len(rows_of) if not behind else rows[-1].section
        free = sorted(zip(numbers or (), seat_ids or (), strict=True))
        rows.append(Row(position, behind, (lowest + highest) / 2, free))
    return rows


def choose(rows: Sequence[Row], count: int, without: Collection[int] = frozenset()) -> list[int]:
    """Return the best `count` free seats; fewer where there are fewer."""
    runs = [run for row in rows for run in row.runs(without)]
    longest_first = sorted(runs, key=lambda run: (-len(run.seat_ids), run.rank(len(run.seat_ids))))
    chosen: list[int] = []
    for position, run in enumerate(longest_first):
        rest = count - len(chosen)
        if len(run.seat_ids) >= rest:
            return chosen + _best(longest_first[position:], rest)
        chosen += run.seat_ids
    return chosen


def _best(longest_first: list[Run], size: int) -> list[int]:
    fitting = takewhile(lambda run: len(run.seat_ids) >= size, longest_first)
    best = min(fitting, key=lambda run: run.rank(size))
    first = best.first_of(size)
    return best.seat_ids[first : first + size]


@contextmanager
def _announced(connection: Connection, seat_ids: list[int]) -> Iterator[set[int]]:
    """Announce that these are about to be booked; yield those that somebody else has announced."""
    with _closed_on_error(connection):
        found = connection.execute(sql.ANNOUNCE_SEATS, {"seat_ids": seat_ids})
        in_other_hands = {seat_id for (seat_id,) in found}
    try:
        yield in_other_hands
    finally:
        if not connection.closed:
            mine = [seat_id for seat_id in seat_ids if seat_id not in in_other_hands]
            with _closed_on_error(connection):
                connection.execute(sql.UNANNOUNCE_SEATS, {"seat_ids": mine})


@contextmanager
def _closed_on_error(connection: Connection) -> Iterator[None]:
    """Close the connection, which takes its locks along, if they can't be told any more.

    Else the next who has it from the pool would keep everybody off these seats.
    """
    try:
        yield
    except psycopg.Error:
        connection.close()
        raise


def _refuse(connection: Connection, wanted: Wanted, free: int, key: Key | None) -> Answer:
    """Refuse for want of seats, unless this very call took the last ones before."""
    with transaction(connection):
        answered = idempotency.claim(connection, key)
        if answered:
            return answered
        if not catalogue.read_performance(connection, wanted.performance_id).open:
            raise problems.not_on_sale("The performance is not on sale at this time.")
        raise problems.seats_unavailable(
            [], f"Only {free} seats are free; nothing was reserved." if free else "It is sold out."
        )
