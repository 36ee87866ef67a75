"""complete_up_to is true at every moment, moves on where nothing happens, stops where it must."""

from collections.abc import Iterator
from datetime import datetime

import pytest
from confluent_kafka import Producer

from data_platform.freshness import Watermarks
from data_platform.topics import Topics
from tests.data_platform.conftest import Platform
from tests.data_platform.histories import event, history
from tests.waiting import wait_until

PLACES = """
SELECT complete_up_to, clock_timestamp() FROM analytics.load_offsets
WHERE topic = %(topic)s ORDER BY kafka_partition
"""
WITHOUT_THEIR_DAY = """
SELECT
    (SELECT count(*) FROM analytics.fct_reservation_events
     WHERE occurred_on IS DISTINCT FROM (occurred_at AT TIME ZONE 'Europe/Berlin')::date),
    (SELECT count(*) FROM analytics.fct_reservations
     WHERE created_on IS DISTINCT FROM (created_at AT TIME ZONE 'Europe/Berlin')::date)
"""
CLAIM = """
INSERT INTO analytics.load_offsets (topic, kafka_partition, next_offset, topic_id)
SELECT '{topic}', n, 0, '{topic_id}' FROM generate_series(0, 5) AS n
"""


@pytest.fixture
def topics(platform: Platform) -> Topics:
    return Topics({"bootstrap.servers": platform.bootstrap_servers})


@pytest.fixture
def watermarks(platform: Platform, topics: Topics) -> Iterator[Watermarks]:
    """Of a platform whose partitions are claimed, and nothing is loaded."""
    platform.execute(CLAIM.format(topic=platform.topic, topic_id=topics.topic_id(platform.topic)))
    made = Watermarks(platform.database.loader_url, topics, [platform.topic])
    yield made
    made.close()


def moments(platform: Platform) -> list[datetime | None]:
    return [row[0] for row in platform.rows(PLACES, {"topic": platform.topic})]


def now(platform: Platform) -> datetime:
    found: datetime = platform.rows("SELECT clock_timestamp()")[0][0]
    return found


def let_be_loaded(platform: Platform, count: int, partition: int = 0) -> None:
    platform.execute(
        f"UPDATE analytics.load_offsets SET next_offset = {count}"  # noqa: S608
        f" WHERE kafka_partition = {partition} AND topic = '{platform.topic}'"
    )


def put(platform: Platform, count: int) -> None:
    platform.produce_raw([(b"k", b"v")] * count, partition=0)


def test_an_idle_partition_is_complete_up_to_when_it_was_asked_for(
    platform: Platform, watermarks: Watermarks
) -> None:
    before = now(platform)
    watermarks.round()
    after = now(platform)
    assert all(moment and before < moment < after for moment in moments(platform))


def test_what_is_not_loaded_holds_the_moment_until_it_is(
    platform: Platform, watermarks: Watermarks
) -> None:
    put(platform, 3)
    watermarks.round()
    assert moments(platform)[0] is None
    asked = now(platform)
    let_be_loaded(platform, 2)
    watermarks.round()
    assert moments(platform)[0] is None
    put(platform, 5)  # came later: the earlier ends are reached without it
    let_be_loaded(platform, 3)
    watermarks.round()
    first = moments(platform)[0]
    assert first is not None
    assert first < now(platform)
    assert asked < first
    watermarks.round()
    assert moments(platform)[0] == first  # five more are not loaded


def test_records_of_an_open_transaction_are_not_in_kafka_yet(
    platform: Platform, watermarks: Watermarks
) -> None:
    producer = Producer(
        {"bootstrap.servers": platform.bootstrap_servers, "transactional.id": platform.topic}
    )
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(platform.topic, b"v", b"k", partition=0)
    producer.flush(10)
    watermarks.round()
    assert moments(platform)[0] is not None
    held = moments(platform)[0]
    producer.commit_transaction(30)
    watermarks.round()
    assert moments(platform)[0] == held


@pytest.mark.parametrize(
    "change",
    ["topic_id = 'of another topic of this name'", "next_offset = 7"],
    ids=["made anew", "shorter than what was loaded"],
)
def test_a_partition_that_cannot_go_on_keeps_its_moment(
    platform: Platform, watermarks: Watermarks, change: str
) -> None:
    platform.execute(f"UPDATE analytics.load_offsets SET {change} WHERE kafka_partition = 0")  # noqa: S608
    watermarks.round()
    first, *others = moments(platform)
    assert first is None
    assert all(others)


def test_a_worker_keeps_the_view_fresh_and_its_absence_shows(platform: Platform) -> None:
    events = history(20, seed=5)
    platform.produce(events)
    worker = platform.worker()

    def complete(since: datetime) -> bool:
        found = platform.rows(
            "SELECT count(*), min(complete_up_to) FROM analytics.freshness WHERE topic = %(topic)s",
            {"topic": platform.topic},
        )[0]
        return bool(found[0] == 6 and found[1] and found[1] > since)

    produced = now(platform)
    wait_until(lambda: complete(produced), 60, "complete up to now")
    assert len(platform.facts()) == len(events)
    assert platform.rows(WITHOUT_THEIR_DAY) == [(0, 0)]
    idle = now(platform)
    wait_until(lambda: complete(idle), 30, "fresh though nothing happens")
    assert worker.stop() == 0
    platform.produce([event()])
    missed = now(platform)
    assert not complete(missed)
    lags = platform.rows("SELECT lag_seconds FROM analytics.freshness WHERE lag_seconds < 60")
    assert lags
