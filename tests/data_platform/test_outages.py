"""Postgres or Kafka away: the worker waits, puts nothing aside, and catches up by itself."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from confluent_kafka import Consumer, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from data_platform.consumer import Source
from data_platform.errors import Cure, cure_of
from data_platform.topics import StoredOffset, Topics
from devstack.kafka import KafkaCluster as Kafka
from devstack.processes import Process
from tests.conftest import MakeKafkaCluster, MakePostgresServer, UniqueTopic
from tests.data_platform.conftest import MakePlatform, Platform
from tests.data_platform.histories import event, expected_facts, expected_states, history
from tests.databases import AnalyticsDatabase, create_analytics_database
from tests.waiting import wait_until

OUTAGE_S = 20.0
OFFSETS = """
SELECT topic, kafka_partition, next_offset, topic_id FROM analytics.load_offsets
ORDER BY topic, kafka_partition
"""


def said(worker: Process, what: str) -> int:
    """How often the worker has logged `what`."""
    return worker.log.read_text().count(f'"event": "{what}"')


def test_postgres_away_for_20_s_costs_nothing_but_time(
    make_platform: MakePlatform,
    make_postgres_server: MakePostgresServer,
    kafka: Kafka,
    unique_topic: UniqueTopic,
) -> None:
    server = make_postgres_server()
    platform = make_platform(create_analytics_database(server), kafka, unique_topic(6))
    events = history(1_500, seed=21)
    third = len(events) // 3
    platform.produce(events[:third])
    worker = platform.worker()
    platform.wait_for_offsets(third)

    server.kill()
    back_at = time.monotonic() + OUTAGE_S
    platform.produce(events[third : 2 * third])
    wait_until(lambda: said(worker, "waiting") == 1, 10, "the worker to say that it waits")
    wait_until(lambda: time.monotonic() > back_at, OUTAGE_S + 1, "the outage to have lasted")
    assert worker.alive
    server.start()
    platform.wait_for_offsets(2 * third)
    platform.produce(events[2 * third :])
    platform.wait_for_offsets(len(events))

    assert worker.alive
    wait_until(lambda: said(worker, "going_on") == 1, 5, "the worker to say that it goes on")
    assert said(worker, "waiting") == 1
    assert "partitions_revoked" not in worker.log.read_text()  # its membership was kept
    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)
    assert platform.dead_letters() == []


def test_kafka_away_for_a_while_costs_nothing_but_time(
    make_platform: MakePlatform,
    make_kafka_cluster: MakeKafkaCluster,
    analytics_database: AnalyticsDatabase,
) -> None:
    cluster = make_kafka_cluster(brokers=1)
    cluster.create_topic("away", 3)
    platform = make_platform(analytics_database, cluster, "away")
    events = history(600, seed=22)
    half = len(events) // 2
    platform.produce(events[:half])
    worker = platform.worker()
    platform.wait_for_offsets(half)

    broker = cluster.brokers[0]
    broker.kill()
    back_at = time.monotonic() + OUTAGE_S / 2
    wait_until(lambda: said(worker, "kafka_trouble") == 1, 10, "the worker to notice")
    wait_until(lambda: time.monotonic() > back_at, OUTAGE_S, "the outage to have lasted")
    assert worker.alive
    broker.start()
    platform.produce(events[half:])
    platform.wait_for_offsets(len(events))

    assert worker.alive
    assert said(worker, "kafka_trouble") == 1
    wait_until(lambda: said(worker, "kafka_answers_again") == 1, 15, "the worker to be glad")
    assert platform.facts() == expected_facts(events)
    assert platform.dead_letters() == []


def test_a_worker_started_before_everything_else_waits_for_it(
    make_platform: MakePlatform,
    kafka: Kafka,
    make_postgres_server: MakePostgresServer,
    tmp_path: Path,
) -> None:
    server = make_postgres_server()
    server.create_database("analytics", "analytics_owner")
    # Neither schema nor role nor topic exist yet.
    url = server.url("analytics", "data_platform", "")
    owner = server.url("analytics", "analytics_owner", server.give_password("analytics_owner"))
    topic = f"late-{tmp_path.name}".replace("_", "-")
    early = AnalyticsDatabase("analytics", owner, url, url)
    worker = make_platform(early, kafka, topic).worker()
    wait_until(lambda: said(worker, "waiting") == 1, 20, "the worker to wait")
    kafka.create_topic(topic, 2)
    wait_until(lambda: "Error: connection" in worker.log.read_text(), 20, "it to miss the database")
    assert worker.alive


def test_a_missing_topic_is_waited_for(
    make_platform: MakePlatform,
    kafka: Kafka,
    analytics_database: AnalyticsDatabase,
    tmp_path: Path,
) -> None:
    topic = f"late-{analytics_database.name}-{tmp_path.name}"
    platform = make_platform(analytics_database, kafka, topic)
    worker = platform.worker()
    wait_until(lambda: said(worker, "waiting") == 1, 20, "the worker to wait")
    kafka.create_topic(topic, 2)
    platform.produce([event("r-1")])
    platform.wait_for_offsets(1)
    wait_until(lambda: said(worker, "going_on") == 1, 5, "the worker to say that it goes on")
    assert said(worker, "waiting") == 1


def test_a_missing_table_is_waited_out_and_nothing_is_put_aside(platform: Platform) -> None:
    platform.execute("ALTER TABLE analytics.fct_reservations RENAME TO gone")
    worker = platform.worker()
    platform.produce([event("r-1")])
    wait_until(lambda: said(worker, "waiting") == 1, 20, "the worker to wait")
    platform.execute("ALTER TABLE analytics.gone RENAME TO fct_reservations")
    platform.wait_for_offsets(1)
    assert platform.dead_letters() == []
    assert worker.alive


def test_a_load_that_fails_again_and_again_is_one_outage(platform: Platform) -> None:
    worker = platform.worker()
    platform.produce(history(100, seed=25))
    wait_until(lambda: platform.status()["lag_rows"] == 0, 30, "everything to be loaded")
    platform.execute("REVOKE INSERT ON analytics.fct_reservation_events FROM data_platform")
    healed_at = time.monotonic() + 6
    platform.produce(more := history(100, seed=26))
    wait_until(lambda: time.monotonic() > healed_at, 10, "the outage to have lasted")
    assert said(worker, "waiting") == 1
    assert said(worker, "going_on") == 0
    # 0.1 s, doubled up to 2 s, and what each try takes; two topics.
    assert 2 <= said(worker, "partitions_placed") / 2 <= 10
    platform.execute("GRANT INSERT ON analytics.fct_reservation_events TO data_platform")
    wait_until(lambda: platform.status()["lag_rows"] == 0, 30, "the rest to be loaded")
    wait_until(lambda: said(worker, "going_on") == 1, 5, "the worker to say that it goes on")
    assert said(worker, "waiting") == 1
    assert set(platform.facts()) >= set(expected_facts(more))


def test_an_outage_after_which_there_is_nothing_to_load_ends_too(platform: Platform) -> None:
    platform.execute("REVOKE SELECT ON analytics.load_offsets FROM data_platform")
    worker = platform.worker()
    wait_until(lambda: said(worker, "waiting") == 1, 20, "the worker to wait")
    platform.execute("GRANT SELECT ON analytics.load_offsets TO data_platform")
    wait_until(lambda: said(worker, "going_on") == 1, 10, "the worker to go on")


def test_a_fatal_error_of_librdkafka_ends_the_worker(
    kafka: Kafka, unique_topic: UniqueTopic
) -> None:
    topic = unique_topic(1)
    client = {"bootstrap.servers": kafka.bootstrap_servers}
    # Static membership, which a properties file can't set, because it can be lost for good.
    member = {
        **client,
        "group.id": topic,
        "group.instance.id": "one",
        "partition.assignment.strategy": "cooperative-sticky",
        "auto.offset.reset": "error",
    }
    source = Source(member, Topics(client), [topic], batch_rows=10, batch_bytes=1000)
    granted: list[int] = []

    def claim(_topic: str, topic_id: str, numbers: Sequence[int]) -> dict[int, StoredOffset]:
        granted.extend(numbers)
        return {number: StoredOffset(0, topic_id) for number in numbers}

    def placed() -> bool:
        source.settle(claim)
        source.fetch(0.1)
        return bool(granted)

    def ended() -> bool:
        rival.poll(0.1)
        try:
            placed()
        except KafkaException as error:
            return cure_of(error) is Cure.END
        return False

    wait_until(placed, 30, "the partition")
    rival = Consumer(member)
    rival.subscribe([topic])
    wait_until(ended, 20, "the first member to end, fenced")
    rival.close()
    source.close()


def test_a_topic_made_anew_stops_its_partitions_loudly_and_loads_nothing(
    platform: Platform,
) -> None:
    platform.produce(history(40, seed=23))
    worker = platform.worker()
    wait_until(lambda: platform.status()["lag_rows"] == 0, 30, "everything to be loaded")
    before = platform.rows(OFFSETS)
    facts = platform.facts()

    admin = AdminClient({"bootstrap.servers": platform.bootstrap_servers})
    admin.delete_topics([platform.topic])[platform.topic].result(10)
    wait_until(lambda: not _exists(admin, platform.topic), 20, "the topic to be gone")
    admin.create_topics([NewTopic(platform.topic, 6, 1)])[platform.topic].result(10)
    wait_until(lambda: _exists(admin, platform.topic), 20, "the topic to be back")
    platform.produce(history(400, seed=24))
    wait_until(lambda: said(worker, "partition_stopped") == 6, 40, "the partitions to stop")

    assert worker.alive
    assert platform.rows(OFFSETS) == before
    assert platform.facts() == facts
    answer = platform.command("status")
    assert answer.returncode == 1
    assert answer.stdout.count("made anew") == 6
    assert worker.stop() == 0


def test_a_topic_that_kafka_lost_the_end_of_stops_the_partition_loudly_and_loads_nothing(
    make_platform: MakePlatform,
    make_kafka_cluster: MakeKafkaCluster,
    analytics_database: AnalyticsDatabase,
) -> None:
    cluster = make_kafka_cluster(brokers=1)
    cluster.create_topic("cut", 2)
    platform = make_platform(analytics_database, cluster, "cut")
    for number in (0, 1):
        platform.produce_raw([(one.key, one.value) for one in history(5, seed=number)], number)
    worker = platform.worker()
    wait_until(lambda: platform.status()["lag_rows"] == 0, 30, "everything to be loaded")
    before = platform.rows(OFFSETS)
    facts = platform.facts()

    broker = cluster.brokers[0]
    broker.stop()
    folder = Path(cluster.properties(broker)["log.dirs"]) / "cut-0"
    for file in folder.iterdir():
        if file.name != "partition.metadata":  # it holds the topic's id, which stays the same
            file.unlink()
    broker.start()
    (late, other) = event("late"), event("other")
    platform.produce_raw([(late.key, late.value)], 0)
    platform.produce_raw([(other.key, other.value)], 1)
    wait_until(lambda: said(worker, "partition_stopped") == 1, 40, "the partition to stop")
    wait_until(lambda: platform.facts() != facts, 20, "the other partition to go on")

    assert set(platform.facts()) - set(facts) == {other.fact}
    assert [row for row in platform.rows(OFFSETS) if row[:2] == ("cut", 0)] == [
        row for row in before if row[:2] == ("cut", 0)
    ]
    answer = platform.command("status")
    assert answer.returncode == 1
    assert "it ends at 1, but was loaded up to" in answer.stdout
    assert worker.alive
    assert worker.stop() == 0


def _exists(admin: AdminClient, topic: str) -> bool:
    described = admin.describe_topics(TopicCollection([topic]))[topic]
    return described.exception(10) is None


def test_a_worker_asked_to_end_while_postgres_is_frozen_ends_within_10_s(
    make_platform: MakePlatform,
    make_postgres_server: MakePostgresServer,
    kafka: Kafka,
    unique_topic: UniqueTopic,
) -> None:
    server = make_postgres_server()
    platform = make_platform(create_analytics_database(server), kafka, unique_topic(1))
    worker = platform.worker()
    platform.produce([event()])
    platform.wait_for_offsets(1)
    server.pause()
    try:
        platform.produce([event()])
        before = time.monotonic()
        assert worker.stop(timeout_s=12.0, how=signal.SIGTERM) == 0
        assert time.monotonic() - before < 10
    finally:
        server.resume()
