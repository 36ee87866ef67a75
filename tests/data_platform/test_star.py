"""The rows of a batch: seats and dimensions, in whatever order and however often events come."""

import copy
import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import psycopg
import pytest
from confluent_kafka import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from data_platform import star
from data_platform.batch import Decoded, Slice, decode
from data_platform.errors import RivalError
from data_platform.events import (
    BadRecordError,
    Decoder,
    decode_concert_event,
    decode_reservation_event,
)
from data_platform.loader import Loader, prepare
from tests.data_platform.concerts import concert_event, record
from tests.data_platform.conftest import Platform
from tests.data_platform.histories import (
    FACTS,
    STATES,
    Event,
    event,
    expected_facts,
    expected_states,
    history,
)
from tests.data_platform.test_events import _storable, json_values, paths
from tests.data_platform.test_loading import WAITING_LOADER
from tests.databases import AnalyticsDatabase
from tests.waiting import wait_until

RESERVATIONS, CATALOGUE = "reservations", "catalogue"
DECODERS: dict[str, Decoder] = {
    RESERVATIONS: decode_reservation_event,
    CATALOGUE: decode_concert_event,
}
SEATS = """
SELECT reservation_id, seat_id, performance_id, section, "row", number, price, currency
FROM analytics.fct_reservation_seats ORDER BY reservation_id, seat_id
"""
SEAT_VERSIONS = """
SELECT reservation_id, min(version), max(version) FROM analytics.fct_reservation_seats
GROUP BY reservation_id ORDER BY reservation_id
"""
CONCERTS = "SELECT concert_id, version, title, currency FROM analytics.dim_concerts ORDER BY 1"
PERFORMANCES = """
SELECT performance_id, concert_id, version, starts_at::text, capacity, status, time_zone
FROM analytics.dim_performances ORDER BY 1
"""


class Tables:
    """A loader, and what it has loaded."""

    def __init__(self, database: AnalyticsDatabase) -> None:
        self.loader = Loader(database.loader_url)
        self._connection = psycopg.connect(database.owner_url, autocommit=True)
        self._connection.execute("SET timezone = 'UTC'")
        self._next = {RESERVATIONS: 0, CATALOGUE: 0}
        for topic in self._next:
            self.loader.claim(topic, "id", [0])

    def load(self, records: Sequence[tuple[bytes, bytes]], topic: str = RESERVATIONS) -> None:
        self.loader.load(self.batch(records, topic))
        self._next[topic] += len(records)

    def batch(self, records: Sequence[tuple[bytes, bytes]], topic: str = RESERVATIONS) -> Decoded:
        first = self._next[topic]
        messages = [
            Message(topic=topic, partition=0, offset=first + n, key=key, value=value)
            for n, (key, value) in enumerate(records)
        ]
        return decode([Slice(topic, 0, "id", first, first + len(messages), messages)], DECODERS)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(query).fetchall()

    def close(self) -> None:
        self.loader.close()
        self._connection.close()


@pytest.fixture
def tables(analytics_database: AnalyticsDatabase) -> Iterator[Tables]:
    found = Tables(analytics_database)
    yield found
    found.close()


def pairs(events: Sequence[Event]) -> list[tuple[bytes, bytes]]:
    return [(one.key, one.value) for one in events]


def expected_seats(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    """The rows of fct_reservation_seats that these events make."""
    latest: dict[str, Event] = {}
    for one in sorted(events, key=lambda one: one.fact[1]):
        latest[one.fact[0]] = one
    return sorted(
        (name, s["seat_id"], one.fact[7], s["section"], s["row"], s["number"], s["price"], "EUR")
        for name, one in latest.items()
        for s in one.envelope["data"]["seats"]
    )


@pytest.mark.parametrize("size", [1, 7, 1_000])
def test_whatever_comes_first_or_again_the_highest_version_shows(tables: Tables, size: int) -> None:
    events = history(60, seed=41)
    dice = random.Random(size)  # noqa: S311 - the same order each time
    delivered = events + dice.sample(events, 40)
    dice.shuffle(delivered)
    for first in range(0, len(delivered), size):
        tables.load(pairs(delivered[first : first + size]))
    assert tables.rows(FACTS) == expected_facts(events)
    assert tables.rows(STATES) == expected_states(events)
    assert tables.rows(SEATS) == expected_seats(events)


def test_a_version_that_comes_after_a_higher_one_changes_no_state(tables: Tables) -> None:
    first, second, third = (event("r-1", n, "reservation.extended") for n in (1, 2, 3))
    for one in (first, third, second):
        tables.load(pairs([one]))
    assert tables.rows(STATES) == [third.state]
    assert tables.rows(FACTS) == [first.fact, second.fact, third.fact]


def test_of_two_loaders_with_one_reservation_the_later_sees_what_the_other_did(
    tables: Tables, analytics_database: AnalyticsDatabase
) -> None:
    one_seat = [{"seat_id": 1, "section": "A", "row": "1", "number": 1, "price": 5}]
    first, second, third = (
        event("r-1", 1),
        event("r-1", 2, "reservation.extended", seats=one_seat),
        event("r-1", 3, "reservation.completed"),
    )
    tables.load(pairs([first]))
    with (
        psycopg.connect(analytics_database.loader_url) as rival,
        psycopg.connect(analytics_database.loader_url, autocommit=True) as watcher,
        ThreadPoolExecutor(1) as pool,
    ):
        prepare(rival)
        star.write(rival, star.rows_of(tables.batch(pairs([second])).rows), ask=False)
        loading = pool.submit(tables.load, pairs([third]))
        wait_until(lambda: watcher.execute(WAITING_LOADER).fetchone(), 5, "the later to wait")
        rival.commit()
        loading.result(10)
    assert tables.rows(STATES) == [third.state]
    # The other one had changed the seats after the later one looked.
    assert tables.rows(SEATS) == expected_seats([third])


def test_seats_are_written_once_unless_they_change(tables: Tables) -> None:
    seats = [
        {"seat_id": n, "section": "a\\b\t\n\r", "row": "ü\\N", "number": n, "price": 5}
        for n in (3, 1, 2)
    ]
    held = event("r-1", 1, seats=seats)
    tables.load(pairs([held]))
    assert tables.rows(SEATS) == expected_seats([held])
    written = tables.rows("SELECT xmin::text, version FROM analytics.fct_reservation_seats")
    tables.load(pairs([event("r-1", 2, "reservation.extended", seats=seats)]))
    assert tables.rows("SELECT xmin::text, version FROM analytics.fct_reservation_seats") == written
    fewer = event("r-1", 3, "reservation.completed", seats=seats[:1])
    tables.load(pairs([fewer]))
    assert tables.rows(SEATS) == expected_seats([fewer])
    assert tables.rows(SEAT_VERSIONS) == [("r-1", 3, 3)]
    tables.load(pairs([event("r-1", 2, "reservation.extended", seats=seats)]))  # again, stale
    assert tables.rows(SEATS) == expected_seats([fewer])


def test_the_version_that_brought_the_seats_does_not_depend_on_the_size_of_batches(
    tables: Tables,
) -> None:
    lives = [[event(name, 1), event(name, 2, "reservation.extended")] for name in ("r-1", "r-2")]
    tables.load(pairs(lives[0]))
    for one in lives[1]:
        tables.load(pairs([one]))
    assert tables.rows(SEAT_VERSIONS) == [("r-1", 1, 1), ("r-2", 1, 1)]


def test_a_seat_told_twice_in_one_event_is_one_seat(tables: Tables) -> None:
    seat = {"seat_id": 7, "section": "A", "row": "1", "number": 7, "price": 5}
    twice = event("r-1", seats=[seat, seat])
    tables.load(pairs([twice]))
    assert tables.rows(SEATS) == expected_seats([event("r-1", seats=[seat])])
    assert tables.rows("SELECT seat_count FROM analytics.fct_reservations") == [(2,)]


def test_a_reservation_loaded_before_there_were_seats_gets_them_with_its_next_event(
    tables: Tables,
) -> None:
    tables.load(pairs([event("r-1")]))
    tables.rows("DELETE FROM analytics.fct_reservation_seats RETURNING 1")
    tables.rows(
        "UPDATE analytics.fct_reservations SET seats_version = NULL, seats_digest = NULL"
        " RETURNING 1"
    )
    after = event("r-1", 2, "reservation.completed")
    tables.load(pairs([after]))
    assert tables.rows(SEATS) == expected_seats([after])


def test_a_later_version_whose_first_never_came_is_loaded(tables: Tables) -> None:
    only = event("r-1", 3, "reservation.completed")
    tables.load(pairs([only]))
    assert tables.rows(STATES) == [only.state]
    assert tables.rows(SEATS) == expected_seats([only])


def test_a_concert_that_only_reservations_tell_of_is_inferred_until_the_catalogue_comes(
    tables: Tables,
) -> None:
    tables.load(pairs([event("r-1")]))
    assert tables.rows(CONCERTS) == [(1, 0, "Nacht der Streicher — Ø", None)]
    starts_at = "2027-05-01 18:00:00+00"
    assert tables.rows(PERFORMANCES) == [(3, 1, 0, starts_at, None, None, "Europe/Berlin")]
    published = concert_event(1, 1)
    published["data"]["performances"][0]["performance_id"] = 3
    tables.load([record(published)], CATALOGUE)
    tables.load(pairs([event("r-2")]))
    assert tables.rows(CONCERTS) == [(1, 1, "Nacht der Streicher — Ø", "EUR")]
    assert tables.rows(PERFORMANCES)[0] == (
        3, 1, 1, starts_at, 400, "scheduled", "Europe/Berlin",
    )  # fmt: skip


def test_of_a_concert_the_highest_version_shows_whatever_comes_last(tables: Tables) -> None:
    third = concert_event(2, 3, performances=2, title="Third")
    second = concert_event(2, 2, performances=3, title="Second")
    tables.load([record(second), record(third), record(second)], CATALOGUE)
    tables.load([record(second)], CATALOGUE)
    assert tables.rows(CONCERTS) == [(2, 3, "Third", "EUR")]
    assert [row[:3] for row in tables.rows(PERFORMANCES)] == [(20, 2, 3), (21, 2, 3), (22, 2, 2)]


def test_another_loader_in_the_way_is_told_from_a_bad_event(
    tables: Tables, analytics_database: AnalyticsDatabase
) -> None:
    tables.load(pairs([event("r-1")]))

    def blind(*_: object) -> dict[str, str]:
        return dict(rows.facts)

    rows = star.rows_of(tables.batch(pairs([event("r-1")])).rows)
    with psycopg.connect(analytics_database.loader_url) as connection:
        with pytest.MonkeyPatch.context() as patch:
            # What the tables tell is always outdated.
            patch.setattr(star, "_without_known_facts", blind)
            with pytest.raises(RivalError):
                star.write(connection, rows, ask=True)
        assert star.write(connection, rows, ask=False) == star.Written(0, repeated=True)


def test_a_catalogue_event_fills_the_dimensions_of_a_running_platform(platform: Platform) -> None:
    platform.worker()
    unbooked = record(concert_event(5, 1))
    platform.produce_raw([unbooked], topic=platform.catalogue_topic)
    platform.produce_raw([(b"5", None)], topic=platform.catalogue_topic)
    platform.produce([event("r-1")])
    wait_until(lambda: platform.loaded_offsets() >= 3, 30, "everything to be loaded")
    assert [row[:2] for row in platform.rows(CONCERTS)] == [(1, 0), (5, 1)]
    assert platform.dead_letters() == [(b"5", None, [], "null-value")]
    status = platform.status()
    assert {one["topic"] for one in status["partitions"]} == {
        platform.topic,
        platform.catalogue_topic,
    }
    assert status["lag_rows"] == 0


SCHEMA = json.loads(
    Path(__file__)
    .parents[2]
    .joinpath("contracts/concert-event.schema.json")
    .read_text(encoding="utf-8")
)
validator = jsonschema.Draft202012Validator(SCHEMA)
TEMPLATE = concert_event(7, 2)


def test_a_concerts_event_is_what_the_schema_describes() -> None:
    validator.validate(TEMPLATE)
    key, value = record(TEMPLATE)
    assert decode_concert_event(key, value).concert.performances[1].performance_id == 71


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(paths(TEMPLATE)), value=json_values, remove=st.booleans())
def test_a_mutated_concert_is_judged_as_the_schema_judges_it(
    path: tuple[Any, ...], value: Any, *, remove: bool
) -> None:
    envelope = copy.deepcopy(TEMPLATE)
    target: Any = envelope
    for name in path[:-1]:
        target = target[name]
    if remove:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    try:
        decode_concert_event(b"7", json.dumps(envelope).encode())
        good = True
    except BadRecordError:
        good = False
    if good:
        validator.validate(envelope)
    elif path[-1] not in {"id", "subject", "concert_id", "version", "time"} and _storable(value):
        assert not validator.is_valid(envelope)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subject": "8"}, "subject"),
        ({"id": "7:3"}, "id"),
        ({"time": "2027-02-30T00:00:00Z"}, "schema"),
        ({"type": "concert.lost"}, "unknown-type"),
        ({"dataschema": "urn:concert-reservation:schema:concert-event:2"}, "unknown-schema"),
    ],
)
def test_a_concert_that_breaks_the_contract_says_how(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRecordError) as caught:
        decode_concert_event(b"7", json.dumps(TEMPLATE | change).encode())
    assert caught.value.reason == reason
