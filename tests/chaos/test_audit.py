"""The audit names each kind of difference, and finds none where every place agrees."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar

import pytest

from chaos.audit import audit, murmur2
from chaos.ledger import Ledger, Order, Told
from chaos.places import (
    AGAIN,
    POISON,
    RESERVATION_TOPIC,
    Fact,
    Funnel,
    Places,
    Record,
    Row,
    State,
    Stored,
)

T = TypeVar("T")
BEGAN = datetime(2026, 11, 23, 10, tzinfo=UTC)
DAY = date(2026, 11, 23)
TYPES = {
    "held": "reservation.held",
    "confirmed": "reservation.completed",
    "cancelled": "reservation.cancelled",
}
# Reservation, seat, and what became of it at which second.
STORY = (
    ("a", 1, (("held", 0), ("confirmed", 1), ("cancelled", 2))),
    ("b", 2, (("confirmed", 1),)),
    ("c", 1, (("confirmed", 3),)),
)
POISONED = Record(RESERVATION_TOPIC, 5, 900, b"poison", None, POISON)


def event(name: str, seat: int, version: int, status: str, second: int) -> bytes:
    began = next(changes[0][1] for other, _, changes in STORY if other == name)
    return json.dumps(
        {
            "id": f"{name}:{version}",
            "subject": name,
            "type": TYPES[status],
            "time": (BEGAN + timedelta(seconds=second)).isoformat(),
            "data": {
                "version": version,
                "status": status,
                "customer_id": "somebody",
                "created_at": (BEGAN + timedelta(seconds=began)).isoformat(),
                "amount": 5000,
                "currency": "EUR",
                "concert": {"concert_id": 7, "time_zone": "Europe/Berlin"},
                "performance": {"performance_id": 8},
                "seats": [{"seat_id": seat, "price": 5000}],
            },
        }
    ).encode()


def order(seat: int) -> Order:
    return Order("somebody", 8, 5000, "EUR", frozenset({(seat, 5000)}))


def agreeing() -> Places:
    """Three reservations that are the same everywhere, a poisoned record, one that came again."""
    outbox, records, facts = [], [], {}
    for name, seat, changes in STORY:
        partition = murmur2(name.encode()) % 6
        for version, (status, second) in enumerate(changes, start=1):
            row = Row(RESERVATION_TOPIC, name.encode(), event(name, seat, version, status, second))
            outbox.append(row)
            records.append(Record(row.topic, partition, len(outbox), row.key, row.value))
            facts[f"{name}:{version}"] = Fact(
                TYPES[status],
                BEGAN + timedelta(seconds=second),
                *(status, "somebody", 7, 8, 1, 5000, "EUR", partition, len(outbox)),
            )
    records += [records[0]._replace(offset=901, mark=AGAIN), POISONED]
    last = {name: (len(changes), changes[-1][0]) for name, _, changes in STORY}
    seat_of = {name: seat for name, seat, _ in STORY}
    return Places(
        told={
            name: Told(order(seat_of[name]), {version: status})
            for name, (version, status) in last.items()
        },
        stored={
            name: Stored(status, version, order(seat_of[name]))
            for name, (version, status) in last.items()
        },
        outbox=outbox,
        records=records,
        facts=facts,
        states={
            name: State(version, status, "somebody", 7, 8, 1, 5000, "EUR")
            for name, (version, status) in last.items()
        },
        seats=frozenset((name, seat, 5000) for name, seat in seat_of.items()),
        dead_letters={POISONED[:3]: (b"poison", None)},
        daily_bookings={(DAY, 8): (3, 3, 15000)},
        occupancy={8: (2, 2, 10000)},
        funnel={(DAY, 8): Funnel(3, 3, 0, 1, 0)},
    )


def without(mapping: Mapping[str, T], name: str) -> dict[str, T]:
    return {key: value for key, value in mapping.items() if key != name}


def misplaced(places: Places) -> list[Record]:
    first, *others = places.records
    return [first._replace(partition=(first.partition + 1) % 6), *others]


Breaks = Callable[[Places], Places]
DIFFERENCES: dict[str, Breaks] = {
    "a client was told of a reservation that isn't there": lambda p: replace(
        p, stored=without(p.stored, "b")
    ),
    "a reservation of which no client was told": lambda p: replace(p, told=without(p.told, "b")),
    "a reservation isn't what its client was told": lambda p: replace(
        p, told={**p.told, "b": Told(order(2), {1: "confirmed", 2: "cancelled"})}
    ),
    "a change isn't what its client was told": lambda p: replace(
        p, told={**p.told, "a": Told(order(1), {1: "confirmed", 3: "cancelled"})}
    ),
    "an answer that no client should get": lambda p: replace(p, unexpected=["500"]),
    "a seat was sold twice": lambda p: replace(
        p,
        outbox=[
            *p.outbox[:3],
            p.outbox[3]._replace(value=p.outbox[3].value.replace(b'"seat_id": 2', b'"seat_id": 1')),
            *p.outbox[4:],
        ],
    ),
    "a change without its event in the outbox": lambda p: replace(p, outbox=p.outbox[:-1]),
    "an event in the outbox without its change": lambda p: replace(
        p, stored={**p.stored, "a": p.stored["a"]._replace(version=2)}
    ),
    "doubled in the outbox": lambda p: replace(
        p, outbox=[*p.outbox, p.outbox[3]], records=[*p.records, p.records[3]]
    ),
    "out of order in the outbox": lambda p: replace(
        p,
        outbox=[p.outbox[1], p.outbox[0], *p.outbox[2:]],
        records=[p.records[1], p.records[0], *p.records[2:]],
    ),
    "the last event in the outbox isn't the reservation's state": lambda p: replace(
        p, stored={**p.stored, "b": p.stored["b"]._replace(status="held")}
    ),
    "lost: committed and not in the topic": lambda p: replace(p, records=p.records[1:]),
    "doubled in the topic": lambda p: replace(p, records=[*p.records, p.records[1]]),
    "invented: in the topic and never committed": lambda p: replace(
        p, records=[*p.records, p.records[0]._replace(value=b"{}")]
    ),
    "out of order in the topic": lambda p: replace(
        p, records=[p.records[1], p.records[0], *p.records[2:]]
    ),
    "in another partition than the key's": lambda p: replace(p, records=misplaced(p)),
    "quarantined": lambda p: replace(p, quarantined=1),
    "an event that isn't in the facts": lambda p: replace(p, facts=without(p.facts, "a:2")),
    "a fact without its event": lambda p: replace(p, facts={**p.facts, "z:1": p.facts["a:1"]}),
    "a fact that says other than its event": lambda p: replace(
        p, facts={**p.facts, "a:1": p.facts["a:1"]._replace(amount=1)}
    ),
    "a fact whose record in Kafka is another one": lambda p: replace(
        p, facts={**p.facts, "a:1": p.facts["a:1"]._replace(offset=2)}
    ),
    "a reservation's state that isn't its last event's": lambda p: replace(
        p, states={**p.states, "a": p.states["a"]._replace(version=1, status="held")}
    ),
    "a reservation's seats that aren't its last event's": lambda p: replace(p, seats=frozenset()),
    "reconcile": lambda p: replace(p, reconcile=["1 differences"]),
    "daily_bookings": lambda p: replace(p, daily_bookings={(DAY, 8): (2, 2, 10000)}),
    "performance_occupancy": lambda p: replace(p, occupancy={}),
    "booking_funnel": lambda p: replace(p, funnel={(DAY, 8): Funnel(3, 2, 1, 0, 0)}),
    "a poisoned record that isn't a dead letter": lambda p: replace(p, dead_letters={}),
    "a dead letter that isn't a poisoned record": lambda p: replace(
        p, dead_letters={**p.dead_letters, (RESERVATION_TOPIC, 0, 1): (b"a", b"{}")}
    ),
    "a dead letter that isn't what came": lambda p: replace(
        p, dead_letters={POISONED[:3]: (b"poison", b"")}
    ),
}


def test_nothing_is_found_where_every_place_agrees() -> None:
    assert audit(agreeing()) == []


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_a_difference_is_found_by_its_name(kind: str) -> None:
    found = {difference.kind: difference for difference in audit(DIFFERENCES[kind](agreeing()))}
    assert kind in found
    assert found[kind].count >= 1
    assert found[kind].examples


def test_a_reservation_is_compared_whole_with_what_was_told() -> None:
    places = agreeing()
    for wrong in (order(2)._replace(amount=1), order(2)._replace(customer_id="another")):
        stored = {**places.stored, "b": places.stored["b"]._replace(order=wrong)}
        (found,) = audit(replace(places, stored=stored))
        assert found.kind == "a reservation isn't what its client was told"


def test_two_bookings_that_were_told_of_one_reservation_are_found() -> None:
    ledger = Ledger()
    answer = order(2)._asdict() | {
        "reservation_id": "b", "version": 1, "status": "confirmed", "expires_at": None,
        "seats": [{"seat_id": 2, "price": 5000}],
    }  # fmt: skip
    ledger.booked(answer, "somebody", 8, [2])
    assert not ledger.unexpected
    ledger.booked(answer, "somebody", 8, [2])
    assert len(ledger.unexpected) == 1
    ledger.booked(answer | {"reservation_id": "c"}, "another", 8, [2])
    assert len(ledger.unexpected) == 2


def test_at_least_once_may_double_and_not_lose() -> None:
    places = agreeing()
    again = replace(places, records=[*places.records, places.records[1]])
    assert audit(again, doubles_allowed=True) == []
    lost = replace(places, records=places.records[1:])
    assert audit(lost, doubles_allowed=True)


def test_of_a_compacted_topic_only_a_keys_newest_record_must_be_there() -> None:
    places = agreeing()
    rows = [Row("concert-catalogue", b"7", value) for value in (b"1", b"2")]
    partition = murmur2(b"7") % 3
    newest = Record("concert-catalogue", partition, 1, b"7", b"2")
    both = replace(places, outbox=[*places.outbox, *rows])
    assert audit(replace(both, records=[*places.records, newest])) == []
    older = newest._replace(value=b"1")
    (found,) = audit(replace(both, records=[*places.records, older]))
    assert found.kind == "lost: committed and not in the topic"


def test_a_record_without_its_headers_is_another_one() -> None:
    places = agreeing()
    row = places.outbox[0]._replace(headers=(("content-type", b"json"),))
    kinds = {found.kind for found in audit(replace(places, outbox=[row, *places.outbox[1:]]))}
    assert "lost: committed and not in the topic" in kinds


def test_rows_that_chaos_wrote_itself_must_be_published_too() -> None:
    places = agreeing()
    row = Row(RESERVATION_TOPIC, b"late", b'{"late":1}', POISON)
    record = Record(row.topic, murmur2(b"late") % 6, 5_000, row.key, row.value, POISON)
    letters = {**places.dead_letters, record[:3]: (row.key, row.value)}
    wanted = replace(places, outbox=[*places.outbox, row], dead_letters=letters)
    assert audit(replace(wanted, records=[*places.records, record])) == []
    (found,) = audit(replace(wanted, dead_letters=places.dead_letters))
    assert found.kind == "lost: committed and not in the topic"


# As the Java client has them.
@pytest.mark.parametrize(
    ("key", "value"),
    [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536)],
)
def test_a_keys_hash_is_that_of_the_java_client(key: bytes, value: int) -> None:
    assert murmur2(key) == value & 0x7FFFFFFF
