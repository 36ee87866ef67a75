"""How many bookings a second, and what each of their parts costs.

A booking is one seat in one step, with an Idempotency-Key, over HTTP. Its limit is what it can't do
without: an empty answer of the same server to the same customers, and its SQL statement alone
(by pgbench, through as many connections). Stretches of all contenders take turns, and each figure
is the median of its own, so that neither a growing table nor a slower disk counts for any of them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from benchmarks import load, old_way
from benchmarks.goals import TIMES, Goal
from benchmarks.results import Figure, Results, find
from benchmarks.shop import WORKERS, Hall, Shop, make_hall, own_outbox, settle, shop
from benchmarks.surroundings import Surroundings
from reservation_service import events, sql
from reservation_service.serve import THREADS_PER_WORKER

LINES = WORKERS * THREADS_PER_WORKER
ROUNDS = 3
WARM_UP_S = 2
MOST_PER_S, MOST_STATEMENTS_PER_S = 5_000, 20_000
HALL_SEATS = 50_000
PLAN_SEATS = 5_000
PLAN_AGAIN_MS = 5.0
WITH_EVENT_SHARE = 0.9
OF_LIMIT_SHARE = 0.6
CROWDED_SHARE = 0.9
OURS, NO_EVENT, EMPTY, STATEMENTS = "booking", "booking, no event", "empty answer", "SQL by pgbench"
CROWDED = "booking, {:,} more seats"

# One reservation a transaction: its id is made of its seat's, which no two transactions share.
RESERVATION = "('01990000-0000-7000-8000-' || lpad(to_hex(:seat::bigint), 12, '0'))"
NEW_EVENT = events.of_new_reservation(
    "01990000-0000-7000-8000-000000000000", confirm=True, trace=None
)
VALUES = {
    "reservation_id": f"{RESERVATION}::uuid",
    "customer_id": "'c' || :client_id",
    "performance_id": ":performance_id",
    "seat_ids": "ARRAY[:seat]",
    "confirm": "true",
    "hold": "interval '10 minutes'",
    "max_seats_per_customer": "0",
    "operation": "'reserve'",
    "key": "'bench ' || :seat",
    "fingerprint": r"'\x00'::bytea",
    "topic": ":topic",
    "envelope": ":envelope",
    "headers": ":headers",
}


def measure(around: Surroundings, results: Results, seconds: int, crowd_seats: int) -> None:
    """Measure bookings beside their limits; then among many seats; then the plan of a hall."""
    old_way.make_function(around.owner_url)
    with own_outbox(around), shop(around) as ours, shop(around, "no-event") as without:
        hall = make_hall(around.owner_url, _seats_needed(seconds))
        settle(around.admin_url)
        labels = {"section": "booking", "contender": "all"}
        with around.steps.step("bookings, and what they consist of"), results.tolerating(labels):
            found = _beside_limits(around, (ours, without), hall, seconds)
            for name, figures in found.items():
                results.add({"section": "booking", "contender": name} | _median(figures))
        with around.steps.step(f"bookings among {crowd_seats:,} more seats"):
            labels = {"section": "booking", "contender": CROWDED.format(crowd_seats)}
            results.attempt(labels, lambda: _crowded(around, ours, hall, seconds, crowd_seats))
        with around.steps.step(f"the plan of {PLAN_SEATS:,} seats"):
            plan = make_hall(around.owner_url, PLAN_SEATS)
            for what in ("plan", "plan-again"):
                labels = {"section": "plan", "contender": what}
                results.attempt(labels, lambda w=what: _plan(ours, plan, w, seconds))  # type: ignore[misc]


def _beside_limits(
    around: Surroundings, shops: tuple[Shop, Shop], hall: Hall, seconds: int
) -> dict[str, list[Figure]]:
    """Return each contender's figures of all rounds."""
    ours, without = shops
    contenders: dict[str, Callable[[], Figure]] = {
        OURS: lambda: _book(ours, hall, seconds),
        NO_EVENT: lambda: _book(without, hall, seconds),
        EMPTY: lambda: ours.load("empty", lines=LINES, seconds=seconds),
        STATEMENTS: lambda: _statements(around, hall, seconds),
    }
    for a_shop in shops:  # the first answers of each worker and connection
        _book(a_shop, hall, WARM_UP_S)
    found: dict[str, list[Figure]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        # There and back again: what wears off in a round does so for all.
        names = list(contenders) if number % 2 else list(reversed(contenders))
        for name in names:
            found[name].append(contenders[name]())
    return found


def _book(a_shop: Shop, hall: Hall, seconds: int) -> Figure:
    figure = a_shop.book(hall, at_most=seconds * MOST_PER_S, lines=LINES, seconds=seconds)
    return figure | {"failed": sum(figure["answers"].values()) - figure["answers"].get("201", 0)}


def _seats_needed(seconds: int) -> int:
    """Return what all stretches together may take: two shops' rounds, and four among the crowd."""
    over_http = 2 * WARM_UP_S + (2 * ROUNDS + 4) * seconds
    return over_http * MOST_PER_S + ROUNDS * seconds * MOST_STATEMENTS_PER_S


def _statements(around: Surroundings, hall: Hall, seconds: int) -> Figure:
    """Run the statement of a booking alone."""
    count = seconds * MOST_STATEMENTS_PER_S
    variables = {
        "n": "-1",
        "first_seat_id": str(hall.take(count)),
        "seats_per_client": str(count // LINES),
        "performance_id": str(hall.performance_id),
        **NEW_EVENT._asdict(),
    }
    running = load.start(around, script(), clients=LINES, seconds=seconds, variables=variables)
    return {"per_s": round(running.finish(), 1)}


def script() -> str:
    """Return a booking as pgbench runs it: the service's own statement with values for names."""
    seat = r"\set seat :first_seat_id + :client_id * :seats_per_client + :n"
    statement = re.sub(r"%\((\w+)\)s", lambda name: VALUES[name[1]], sql.BOOK_SEATS).strip()
    return "\n".join([r"\set n :n + 1", seat, f"{statement};"]) + "\n"


def _crowded(
    around: Surroundings, ours: Shop, hall: Hall, seconds: int, crowd_seats: int
) -> Figure:
    before = _median([_book(ours, hall, seconds) for _ in range(2)])
    for _ in range(crowd_seats // HALL_SEATS):
        make_hall(around.owner_url, HALL_SEATS)
    settle(around.admin_url)
    after = _median([_book(ours, hall, seconds) for _ in range(2)])
    return after | {"before_per_s": before["per_s"], "ratio": after["per_s"] / before["per_s"]}


def _plan(ours: Shop, plan: Hall, what: str, seconds: int) -> Figure:
    found = ours.load(
        what, performance_id=plan.performance_id, lines=1, seconds=max(2, seconds // 3)
    )
    return found | {"failed": onsale_errors(found)}


def onsale_errors(figure: Figure) -> int:
    """Return how many requests were answered neither with 200 nor with 304."""
    return sum(count for status, count in figure["answers"].items() if status not in {"200", "304"})


def _median(figures: Sequence[Figure]) -> dict[str, Any]:
    """Return the median of each number; counts are summed up."""
    names = [name for name, value in figures[0].items() if isinstance(value, int | float)]
    found = {name: round(median(figure[name] for figure in figures), 2) for name in names}
    return found | {"failed": sum(figure.get("failed", 0) for figure in figures)}


def goals(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Yield what bookings have to reach."""
    speeds = {
        figure["contender"]: figure["per_s"]
        for figure in figures
        if figure["section"] == "booking" and not figure.get("error")
    }
    known = {OURS, NO_EVENT, EMPTY, STATEMENTS} <= set(speeds)
    share = round(speeds[OURS] / speeds[NO_EVENT], 3) if known else None
    yield Goal("bookings, against without the outbox row", TIMES, WITH_EVENT_SHARE, share)
    limit = 1 / (1 / speeds[EMPTY] + 1 / speeds[STATEMENTS]) if known else 1.0
    share = round(speeds[OURS] / limit, 3) if known else None
    yield Goal("bookings, of 1/(1/empty answer + 1/SQL)", TIMES, OF_LIMIT_SHARE, share)
    for figure in figures:
        if figure["section"] == "booking" and "ratio" in figure:
            what = f"{figure['contender']}, against before"
            yield Goal(what, TIMES, CROWDED_SHARE, round(figure["ratio"], 3))
    again = find(figures, section="plan", contender="plan-again")
    what = f"plan of {PLAN_SEATS:,} seats unchanged (304), p99"
    yield Goal(what, "ms", PLAN_AGAIN_MS, again["p99_ms"] if again else None, at_most=True)
