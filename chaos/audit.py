"""Compares what clients were told with every place that has to agree: pure, so it can be tested.

Each kind of difference has a name. Where records are compared they are compared whole, byte for
byte; nothing that chaos itself did on purpose counts, and nothing else is forgiven.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from chaos.ledger import Order
from chaos.places import (
    AGAIN,
    CATALOGUE_TOPIC,
    RESERVATION_TOPIC,
    Fact,
    Funnel,
    Places,
    Record,
    Row,
    State,
)

EXAMPLES = 5
PARTITIONS = {RESERVATION_TOPIC: 6, CATALOGUE_TOPIC: 3}
K = TypeVar("K")


@dataclass(frozen=True)
class Difference:
    """Something that does not agree: its kind, how often, and the first few."""

    kind: str
    count: int
    examples: Sequence[str]


def audit(places: Places, *, doubles_allowed: bool = False) -> list[Difference]:
    """Return all differences, none when every promise was kept.

    Args:
        places: what each place holds, nothing being on its way.
        doubles_allowed: whether the relay may have published an event again (at_least_once);
            then only the first appearances count for the order.
    """
    found = []
    truth = _Truth(places)
    for check in (_clients, _seats, _outbox, _topics, _tables, _aggregates, _dead_letters):
        for kind, examples in check(truth):
            if examples and not (doubles_allowed and kind == "doubled in the topic"):
                found.append(Difference(kind, len(examples), [str(e) for e in examples[:EXAMPLES]]))
    return found


Findings = Iterator[tuple[str, Sequence[object]]]


class _Truth:
    """The places, and what is derived from the outbox once for all checks."""

    def __init__(self, places: Places) -> None:
        self.places = places

    @cached_property
    def written(self) -> list[dict[str, Any]]:
        """The service's reservation events, in the order of the outbox, repeated ones again."""
        return [
            json.loads(row.value)
            for row in self.places.outbox
            if row.topic == RESERVATION_TOPIC and not row.mark
        ]

    @cached_property
    def events(self) -> dict[str, dict[str, Any]]:
        """They by their ids."""
        return {event["id"]: event for event in self.written}

    @cached_property
    def latest(self) -> dict[str, dict[str, Any]]:
        """Each reservation's last event."""
        return {event["subject"]: event for event in self.events.values()}


# ---- what clients know, and the service


def _clients(truth: _Truth) -> Findings:
    told, stored = truth.places.told, truth.places.stored
    yield "a client was told of a reservation that isn't there", sorted(told.keys() - stored.keys())
    yield "a reservation of which no client was told", sorted(stored.keys() - told.keys())
    yield (
        "a reservation isn't what its client was told",
        [
            f"{name}: told {told[name].final_status} of {told[name].version}, is {one.status}"
            f" of {one.version}"
            for name, one in stored.items()
            if name in told
            and (
                one.status != told[name].final_status
                or one.order != told[name].order
                # Of a hold an extension may be, and its end is, untold; of all else nothing is.
                or one.version < told[name].version
                or (one.version > told[name].version and one.status != "expired")
            )
        ],
    )
    yield (
        "a change isn't what its client was told",
        [
            f"{name}:{version}: told {status}"
            for name, one in told.items()
            for version, status in one.statuses.items()
            if (event := truth.events.get(f"{name}:{version}")) is not None
            and (event["data"]["status"], _order(event)) != (status, one.order)
        ],
    )
    yield "an answer that no client should get", truth.places.unexpected


def _seats(truth: _Truth) -> Findings:
    """No two reservations may have had a seat at the same moment, by the database's own clock."""
    claims: dict[int, list[tuple[datetime, datetime, str]]] = defaultdict(list)
    begun: dict[str, datetime] = {}
    for event in truth.events.values():
        name, at = event["subject"], _time(event["time"])
        begun.setdefault(name, at)
        if event["data"]["status"] in {"cancelled", "expired"}:
            for seat in event["data"]["seats"]:
                claims[seat["seat_id"]].append((begun[name], at, name))
    forever = datetime.max.replace(tzinfo=_time("2000-01-01T00:00:00Z").tzinfo)
    for name, event in truth.latest.items():
        if event["data"]["status"] in {"held", "confirmed"}:
            for seat in event["data"]["seats"]:
                claims[seat["seat_id"]].append((begun[name], forever, name))
    oversold = []
    for seat_id, held in claims.items():
        held.sort()
        for (_, until, one), (since, _, other) in pairwise(held):
            if since < until:
                oversold.append(f"seat {seat_id}: {one} and {other}")
    yield "a seat was sold twice", oversold


def _outbox(truth: _Truth) -> Findings:
    wanted = {
        f"{name}:{version}"
        for name, one in truth.places.stored.items()
        for version in range(1, one.version + 1)
    }
    yield "a change without its event in the outbox", sorted(wanted - truth.events.keys())
    yield "an event in the outbox without its change", sorted(truth.events.keys() - wanted)
    ids = [(event["subject"], event["data"]["version"]) for event in truth.written]
    yield "doubled in the outbox", [one for one, count in Counter(ids).items() if count > 1]
    last: dict[str, int] = {}
    backwards = []
    for name, version in ids:
        if version < last.get(name, 0):
            backwards.append(f"{name}:{version}")
        last[name] = version
    yield "out of order in the outbox", backwards
    yield (
        "the last event in the outbox isn't the reservation's state",
        [
            name
            for name, event in truth.latest.items()
            if (one := truth.places.stored.get(name)) is not None
            and (event["data"]["version"], event["data"]["status"]) != (one.version, one.status)
        ],
    )


# ---- the topics


def _topics(truth: _Truth) -> Findings:
    rows = [row._replace(mark="") for row in truth.places.outbox]
    # Chaos puts rows into the outbox, too; those the relay has published like any other.
    foreign = {row._replace(mark="") for row in truth.places.outbox if row.mark}
    ours = [record for record in truth.places.records if not record.mark or record.row in foreign]
    committed = Counter(rows)
    published = Counter(record.row for record in ours)
    # What compaction may take away is no loss as long as the newest of a key is there.
    newest = {row.key: row for row in rows if row.topic == CATALOGUE_TOPIC}
    kept = set(newest.values())
    missing = [
        row
        for row in committed - published
        if row.topic != CATALOGUE_TOPIC or (row in kept and row not in published)
    ]
    yield "lost: committed and not in the topic", [_about(row) for row in missing]
    more = published - committed
    yield "doubled in the topic", [_about(row) for row in more if row in committed]
    yield (
        "invented: in the topic and never committed",
        [_about(row) for row in more if row not in committed],
    )
    yield "out of order in the topic", _reordered(rows, ours)
    yield (
        "in another partition than the key's",
        [
            f"{_about(record)} in {record.partition}"
            for record in ours
            if record.partition != murmur2(record.key or b"") % PARTITIONS[record.topic]
        ],
    )
    yield "quarantined", ["events"] * truth.places.quarantined


def _reordered(rows: Sequence[Row], ours: Sequence[Record]) -> list[str]:
    """Name the keys whose records don't come first in the order of the outbox's ids."""
    place = {row: number for number, row in enumerate(rows)}
    last: dict[tuple[str, bytes | None], int] = {}
    found = []
    for row in dict.fromkeys(record.row for record in ours):
        key, number = (row.topic, row.key), place.get(row, -1)
        if number < last.get(key, -1):
            found.append(_about(row))
        last[key] = max(number, last.get(key, -1))
    return found


def _about(one: Row | Record) -> str:
    try:
        return str(json.loads(one.value or b"")["id"])
    except (ValueError, KeyError, TypeError):
        return f"{one.topic} {one.key!r}"


# ---- the analysts' tables


def _tables(truth: _Truth) -> Findings:
    places, events = truth.places, truth.events
    yield "an event that isn't in the facts", sorted(events.keys() - places.facts.keys())
    yield "a fact without its event", sorted(places.facts.keys() - events.keys())
    yield (
        "a fact that says other than its event",
        [name for name, fact in places.facts.items() if _differs(fact, events.get(name))],
    )
    origins = {
        (record.partition, record.offset): record
        for record in places.records
        if record.topic == RESERVATION_TOPIC
    }
    yield (
        "a fact whose record in Kafka is another one",
        [
            name
            for name, fact in places.facts.items()
            if (record := origins.get((fact.partition, fact.offset))) is None
            or _about(record) != name
        ],
    )
    states = {name: _state(event) for name, event in truth.latest.items()}
    yield "a reservation's state that isn't its last event's", _unequal(states, places.states)
    seats = {
        (name, seat["seat_id"], seat["price"])
        for name, event in truth.latest.items()
        for seat in event["data"]["seats"]
    }
    yield "a reservation's seats that aren't its last event's", sorted(seats ^ places.seats)
    yield "reconcile", places.reconcile


def _differs(fact: Fact, event: Mapping[str, Any] | None) -> bool:
    if event is None:
        return False  # told already
    state = _state(event)
    return fact[:9] != (event["type"], _time(event["time"]), *state[1:])


def _state(event: Mapping[str, Any]) -> State:
    data = event["data"]
    return State(
        data["version"],
        data["status"],
        data["customer_id"],
        data["concert"]["concert_id"],
        data["performance"]["performance_id"],
        len(data["seats"]),
        data["amount"],
        data["currency"],
    )


def _order(event: Mapping[str, Any]) -> Order:
    data = event["data"]
    return Order(
        data["customer_id"],
        data["performance"]["performance_id"],
        data["amount"],
        data["currency"],
        frozenset((seat["seat_id"], seat["price"]) for seat in data["seats"]),
    )


def _aggregates(truth: _Truth) -> Findings:
    daily: dict[tuple[date, int], tuple[int, int, int]] = {}
    completed = set()
    for event in truth.events.values():
        if event["type"] == "reservation.completed":
            completed.add(event["subject"])
            _add(daily, (_day(event, event["time"]), _performance(event)), event)
    yield "daily_bookings", _unequal(daily, truth.places.daily_bookings)
    occupancy: dict[int, tuple[int, int, int]] = {}
    funnel: dict[tuple[date, int], Funnel] = {}
    for name, event in truth.latest.items():
        status = event["data"]["status"]
        if status == "confirmed":
            _add(occupancy, _performance(event), event)
        at = _day(event, event["data"]["created_at"]), _performance(event)
        before, done = funnel.get(at, Funnel(0, 0, 0, 0, 0)), name in completed
        more = Funnel(
            started=1,
            completed=done,
            cancelled_before=status == "cancelled" and not done,
            cancelled_after=status == "cancelled" and done,
            expired=status == "expired",
        )
        funnel[at] = Funnel(*(a + b for a, b in zip(before, more, strict=True)))
    yield "performance_occupancy", _unequal(occupancy, truth.places.occupancy)
    yield "booking_funnel", _unequal(funnel, truth.places.funnel)


def _add(sums: dict[K, tuple[int, int, int]], key: K, event: Mapping[str, Any]) -> None:
    bookings, seats, revenue = sums.get(key, (0, 0, 0))
    data = event["data"]
    sums[key] = (bookings + 1, seats + len(data["seats"]), revenue + data["amount"])


def _performance(event: Mapping[str, Any]) -> int:
    return int(event["data"]["performance"]["performance_id"])


def _day(event: Mapping[str, Any], moment: str) -> date:
    return _time(moment).astimezone(ZoneInfo(event["data"]["concert"]["time_zone"])).date()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _unequal(wanted: Mapping[K, object], found: Mapping[K, object]) -> list[str]:
    return [
        f"{key}: {found.get(key)} instead of {wanted.get(key)}"
        for key in sorted(wanted.keys() | found.keys(), key=str)
        if wanted.get(key) != found.get(key)
    ]


# ---- what can't be loaded


def _dead_letters(truth: _Truth) -> Findings:
    wanted = {
        (record.topic, record.partition, record.offset): (record.key, record.value)
        for record in truth.places.records
        if record.mark not in {"", AGAIN}
    }
    found = truth.places.dead_letters
    yield "a poisoned record that isn't a dead letter", sorted(wanted.keys() - found.keys())
    yield "a dead letter that isn't a poisoned record", sorted(found.keys() - wanted.keys())
    yield (
        "a dead letter that isn't what came",
        [at for at, letter in found.items() if wanted.get(at, letter) != letter],
    )


def murmur2(key: bytes) -> int:
    """Return the hash by which the Java client chooses a key's partition, not negative."""
    length, mask, mix = len(key), 0xFFFFFFFF, 0x5BD1E995
    found = 0x9747B28C ^ length
    whole = length & ~3
    for place in range(0, whole, 4):
        four = int.from_bytes(key[place : place + 4], "little") * mix & mask
        four = (four ^ four >> 24) * mix & mask
        found = found * mix & mask ^ four
    if rest := key[whole:]:
        found = (found ^ int.from_bytes(rest, "little")) * mix & mask
    found = (found ^ found >> 13) * mix & mask
    return (found ^ found >> 15) & 0x7FFFFFFF
