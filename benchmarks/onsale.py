"""The moment in which everybody wants the same seats: an on-sale, and a single hot seat.

`fans`: 5,000 people come within seconds for 2,000 seats, each on a connection of his own. They look
at the plan, hold seats that are free there, try others when somebody was quicker, and confirm.

`rush`: 500 people claim one seat at the same moment.

What was sold is counted in the database afterwards, and compared with what people were told.
"""

from collections.abc import Iterator, Sequence

import psycopg

from benchmarks.goals import Goal
from benchmarks.results import Figure, Results, find
from benchmarks.shop import Shop, make_hall, own_outbox, settle, shop
from benchmarks.surroundings import Surroundings

FANS, SEATS = 5_000, 2_000
ARRIVE_WITHIN_S, DONE_WITHIN_S = 20, 30
CLAIMS, CLAIMS_WITHIN_MS = 500, 1_000
RUSHES = 3

# What must be empty, or one: a seat in two live reservations; seats that are sold.
SOLD_TWICE = """
SELECT count(*) FROM (
    SELECT seat_id FROM reservation_seats JOIN reservations USING (reservation_id)
    WHERE performance_id = %(performance_id)s AND status IN ('held', 'confirmed')
    GROUP BY seat_id HAVING count(*) > 1
) AS twice
"""
SOLD = """
SELECT count(*) FROM reservation_seats JOIN reservations USING (reservation_id)
WHERE performance_id = %(performance_id)s AND status = 'confirmed'
"""


def measure(around: Surroundings, results: Results) -> None:
    """Sell a hall, then single seats to a crowd."""
    with own_outbox(around), shop(around) as open_shop:
        with around.steps.step(f"on-sale: {FANS:,} people for {SEATS:,} seats"):
            labels = {"section": "onsale", "contender": "fans"}
            results.attempt(labels, lambda: _sell_out(around, open_shop))
        with around.steps.step(f"{CLAIMS} claims of one seat"):
            labels = {"section": "onsale", "contender": "rush"}
            results.attempt(labels, lambda: _rush(around, open_shop))


def _sell_out(around: Surroundings, open_shop: Shop) -> Figure:
    hall = make_hall(around.owner_url, SEATS)
    settle(around.admin_url)
    figure = open_shop.load(
        "fans", performance_id=hall.performance_id, lines=FANS, seconds=ARRIVE_WITHIN_S
    )
    sold = _count(around, SOLD, hall.performance_id)
    ends = figure["ends"]
    return figure | {
        "sold": sold,
        "told_sold": ends.get("seats booked", 0),
        "sold_twice": _count(around, SOLD_TWICE, hall.performance_id),
        "server_errors": server_errors(figure),
        "unanswered": FANS - ends.get("booked", 0) - ends.get("sold out", 0),
    }


def _rush(around: Surroundings, open_shop: Shop) -> Figure:
    hall = make_hall(around.owner_url, RUSHES)
    found = [
        open_shop.load(
            "rush",
            performance_id=hall.performance_id,
            first_seat_id=hall.take(1),
            lines=CLAIMS,
            seconds=1,
        )
        for _ in range(RUSHES)
    ]
    slowest = max(found, key=lambda figure: figure["max_ms"])
    return slowest | {
        "sold": _count(around, SOLD, hall.performance_id),
        "sold_twice": _count(around, SOLD_TWICE, hall.performance_id),
        "server_errors": sum(map(server_errors, found)),
        "unanswered": CLAIMS * RUSHES - sum(sum(f["answers"].values()) for f in found),
    }


def server_errors(figure: Figure) -> int:
    """Return how many requests were answered with 5xx, or not at all."""
    return sum(
        count
        for status, count in figure["answers"].items()
        if int(status) >= 500 or int(status) == 0
    )


def _count(around: Surroundings, statement: str, performance_id: int) -> int:
    with psycopg.connect(around.owner_url) as connection:
        found = connection.execute(statement, {"performance_id": performance_id}).fetchone()
    return int(found[0]) if found else 0


def goals(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Yield what an on-sale has to reach."""
    for contender, what in (
        ("fans", f"{FANS:,} people for {SEATS:,} seats"),
        ("rush", f"{CLAIMS} claims of one seat"),
    ):
        found = find(figures, section="onsale", contender=contender) or {}
        for name, title in (
            ("sold_twice", "seats sold twice"),
            ("server_errors", "5xx"),
            ("unanswered", "people without an answer"),
        ):
            yield Goal(f"{what}: {title}", "", 0, found.get(name), at_most=True)
    fans = find(figures, section="onsale", contender="fans") or {}
    yield Goal("on-sale: all is over after", "s", DONE_WITHIN_S, fans.get("seconds"), at_most=True)
    rush = find(figures, section="onsale", contender="rush") or {}
    what = "hot seat: the last answer after"
    yield Goal(what, "ms", CLAIMS_WITHIN_MS, rush.get("max_ms"), at_most=True)
