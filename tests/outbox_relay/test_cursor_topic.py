"""How a session finds the last committed cursor, and how sure it is before it refuses."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from confluent_kafka import OFFSET_INVALID, Producer
from confluent_kafka.admin import ListOffsetsResultInfo  # type: ignore[attr-defined]

from devstack.kafka import KafkaCluster
from outbox_relay import exactly_once
from outbox_relay.config import Settings
from outbox_relay.cursor import Cursor
from outbox_relay.exactly_once import CursorRecords, ExactlyOnce, offset_in
from outbox_relay.leadership import Identity, RefusedError
from outbox_relay.producer import PublishError, make_admin
from outbox_relay.reader import EMPTY_SNAPSHOT, Position
from tests.conftest import UniqueTopic
from tests.databases import ReservationDatabase
from tests.outbox_relay.conftest import StartRelay
from tests.outbox_relay.records import read_topic
from tests.outbox_relay.scenes import make_outbox

pytestmark = pytest.mark.needs_kafka


def records_of(kafka: KafkaCluster, cursor_topic: str) -> CursorRecords:
    settings = Settings(
        outbox_relay_database_url="postgresql://nobody@127.0.0.1/none",
        kafka_bootstrap_servers=kafka.bootstrap_servers,
        outbox_relay_name=cursor_topic.removeprefix("outbox-relay-cursor."),
    )
    return CursorRecords(settings, "t", make_admin(settings.kafka_properties()), lambda: None)


def write(kafka: KafkaCluster, topic: str, sequences: Sequence[int], key: bytes = b"t") -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    for sequence in sequences:
        cursor = Cursor(Position(EMPTY_SNAPSHOT, "0/0"), Identity(0, 0, ""), sequence=sequence)
        producer.produce(topic, cursor.to_json(), key)
    assert producer.flush(20) == 0


def test_a_cursor_is_read_up_to_the_barrier_whatever_end_a_broker_tells(
    kafka: KafkaCluster, unique_topic: UniqueTopic
) -> None:
    topic = unique_topic(partitions=1, prefix="outbox-relay-cursor.r")
    write(kafka, topic, [1])
    records, found = records_of(kafka, topic), []
    reading = threading.Thread(target=lambda: found.append(records.read(up_to=2)))
    reading.start()
    # So far the broker tells the end of what is there: 1.
    reading.join(1)
    assert reading.is_alive()
    write(kafka, topic, [2])
    write(kafka, topic, [3], key=b"barrier")
    reading.join(20)
    assert [cursor and cursor.sequence for cursor in found] == [2]


def test_a_barrier_that_never_comes_is_given_up(
    kafka: KafkaCluster, unique_topic: UniqueTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = unique_topic(partitions=1, prefix="outbox-relay-cursor.r")
    write(kafka, topic, [1])
    monkeypatch.setattr(exactly_once, "OPEN_WITHIN_S", 1.0)
    with pytest.raises(PublishError, match="not reached in time"):
        records_of(kafka, topic).read(up_to=1)


def test_a_session_writes_its_barrier_before_anything_else(
    reservation_database: ReservationDatabase, kafka: KafkaCluster, start_relay: StartRelay
) -> None:
    outbox = make_outbox(reservation_database, kafka)
    outbox.insert("a", "1")
    relay = start_relay(outbox)
    outbox.wait_for(1)
    assert relay.stop() == 0
    keys = [record.key for record in read_topic(outbox.bootstrap_servers, outbox.cursor_topic)]
    assert keys[0] == "barrier"
    assert keys.count("barrier") == 1


@pytest.mark.parametrize(("times", "refuses"), [(2, False), (1000, True)])
def test_only_what_is_found_again_and_again_is_refused(
    monkeypatch: pytest.MonkeyPatch, *, times: int, refuses: bool
) -> None:
    # A broker that was frozen and woke up tells ends of long ago, for a moment.
    monkeypatch.setattr(exactly_once, "SURE_AFTER_S", 0.5)
    monkeypatch.setattr(exactly_once, "SURE_INTERVAL_S", 0.01)
    session = object.__new__(ExactlyOnce)
    went_on: list[int] = []
    monkeypatch.setattr(session, "_channel", Going(went_on), raising=False)
    left = iter(range(times))

    def check() -> None:
        if next(left, None) is not None:
            raise RefusedError("shorter than the cursor knows")

    if refuses:
        with pytest.raises(RefusedError):
            session._refuse_for_good(check)
    else:
        session._refuse_for_good(check)
        assert len(went_on) == times


class Going:
    """As much of a channel as a wait needs."""

    def __init__(self, went_on: list[int]) -> None:
        self._went_on = went_on

    def go_on(self) -> None:
        """Note that the wait goes on."""
        self._went_on.append(1)


def test_an_offset_that_no_broker_tells_is_no_end_of_a_topic() -> None:
    def answer(offset: int) -> "Future[Any]":
        asked: Future[Any] = Future()
        asked.set_result(ListOffsetsResultInfo(offset, -1, -1))
        return asked

    assert offset_in(answer(7), "events") == 7
    with pytest.raises(PublishError, match="no offset of topic events"):
        offset_in(answer(OFFSET_INVALID), "events")
