"""Workers join, leave, die and freeze: nothing is lost or doubled, and the others go on."""

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from data_platform import config
from devstack.kafka import KafkaCluster
from devstack.processes import Process
from tests.conftest import MakeKafkaCluster, UniqueTopic
from tests.data_platform.conftest import MakePlatform, Platform
from tests.data_platform.histories import event, expected_facts, expected_states, history
from tests.data_platform.test_commands import settings
from tests.data_platform.test_outages import said
from tests.databases import AnalyticsDatabase
from tests.waiting import wait_until

# What a worker that leaves, or one that comes, may cost; by the log it is about a tenth of it.
PAUSE_LIMIT_S = 5.0


def without_classic_settings(platform: Platform) -> Platform:
    """Let its workers choose the group protocol."""
    platform.properties_file.write_text("")
    return platform


def placed(worker: Process) -> bool:
    return said(worker, "partitions_placed") > 0


def group_type(platform: Platform) -> str:
    admin = AdminClient({"bootstrap.servers": platform.bootstrap_servers})
    group = admin.describe_consumer_groups([platform.group])[platform.group].result(10)
    return str(group.type.name)


def longest_pause_s(platform: Platform, since: datetime, until: datetime) -> float:
    """The longest time without a load in any partition between two moments."""
    rows = platform.rows(
        "WITH loads AS ("
        "  SELECT DISTINCT kafka_partition, loaded_at FROM analytics.fct_reservation_events"
        "  WHERE loaded_at BETWEEN %(since)s AND %(until)s"
        "), pauses AS ("
        "  SELECT loaded_at - lag(loaded_at) OVER (PARTITION BY kafka_partition ORDER BY loaded_at)"
        "      AS pause FROM loads"
        ") SELECT extract(epoch FROM max(pause))::float8 FROM pauses",
        {"since": since, "until": until},
    )
    return float(rows[0][0])


def test_workers_join_and_leave_by_the_brokers_own_protocol(
    platform: Platform, record_property: Callable[[str, object], None]
) -> None:
    platform = without_classic_settings(platform)
    events = history(8_000, seed=51)
    first = platform.worker(DATA_PLATFORM_BATCH_ROWS="50")
    platform.produce(events)
    platform.wait_for_offsets(1)
    began = platform.rows("SELECT clock_timestamp()")[0][0]
    second = platform.worker(DATA_PLATFORM_BATCH_ROWS="50")
    wait_until(lambda: placed(second), 30, "a share for the second")
    assert group_type(platform) == "CONSUMER"
    assert second.stop() == 0
    platform.wait_for_offsets(len(events))
    ended = platform.rows("SELECT clock_timestamp()")[0][0]

    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)
    assert first.alive
    pause_s = longest_pause_s(platform, began, ended)
    record_property("pause_s", pause_s)
    assert pause_s < PAUSE_LIMIT_S


def test_each_of_as_many_workers_as_partitions_has_one_of_the_events(
    make_platform: MakePlatform,
    kafka: KafkaCluster,
    analytics_database: AnalyticsDatabase,
    unique_topic: UniqueTopic,
) -> None:
    topic, catalogue = unique_topic(3), unique_topic(3)
    platform = without_classic_settings(make_platform(analytics_database, kafka, topic))
    workers = [platform.worker(DATA_PLATFORM_CATALOGUE_TOPIC=catalogue) for _ in range(3)]
    wait_until(lambda: any(map(placed, workers)), 30, "a group")
    admin = AdminClient({"bootstrap.servers": platform.bootstrap_servers})

    def shares() -> list[int]:
        group = admin.describe_consumer_groups([platform.group])[platform.group].result(10)
        return [
            sum(one.topic == topic for one in member.assignment.topic_partitions)
            for member in group.members
        ]

    wait_until(lambda: shares() == [1, 1, 1], 30, "a partition of the events for each")


# One that knows the protocol and refuses it; and one that never heard of it, and says nothing.
@pytest.mark.parametrize("version", ["4.3.0", "3.9.2"])
def test_a_broker_without_that_protocol_is_joined_the_classic_way(
    make_platform: MakePlatform,
    make_kafka_cluster: MakeKafkaCluster,
    analytics_database: AnalyticsDatabase,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
) -> None:
    monkeypatch.setenv("DEVSTACK_KAFKA", version)
    refusal = {"group.coordinator.rebalance.protocols": "classic"}
    cluster = make_kafka_cluster(1, refusal if version == "4.3.0" else None)
    cluster.create_topic("old", 3)
    platform = without_classic_settings(make_platform(analytics_database, cluster, "old"))
    events = history(50, seed=52)
    platform.produce(events)
    worker = platform.worker()
    platform.wait_for_offsets(len(events))
    assert said(worker, "classic_group") == 1
    assert group_type(platform) == "CLASSIC"
    assert platform.facts() == expected_facts(events)
    assert worker.stop() == 0


def test_settings_of_the_classic_protocol_choose_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "kafka.properties"
    for line, expected in (
        ("", "consumer"),
        ("group.protocol=consumer", "consumer"),
        ("group.protocol=classic", None),
        ("session.timeout.ms=6000", None),
    ):
        file.write_text(line)
        found = settings(monkeypatch, KAFKA_PROPERTIES_FILE=str(file)).new_group_properties()
        assert (found and found["group.protocol"]) == expected
    file.write_text("group.protocol=mine")
    with pytest.raises(config.ConfigurationError, match=r"group\.protocol"):
        settings(monkeypatch, KAFKA_PROPERTIES_FILE=str(file)).new_group_properties()


def test_a_worker_frozen_beyond_its_session_wakes_up_to_find_its_partitions_gone(
    platform: Platform,
) -> None:
    events = history(6_000, seed=53)
    frozen = platform.worker(DATA_PLATFORM_BATCH_ROWS="100")
    other = platform.worker(DATA_PLATFORM_BATCH_ROWS="100")
    wait_until(lambda: placed(frozen) and placed(other), 30, "a share for each")
    half = len(events) // 2
    platform.produce(events[:half])
    platform.wait_for_offsets(1)
    frozen.pause()
    platform.wait_for_offsets(half)  # the other one has all of it
    frozen.resume()
    platform.produce(events[half:])
    platform.wait_for_offsets(len(events))

    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)
    assert platform.dead_letters() == []
    # It is a member again, not a bystander: alone it does all of the rest.
    assert other.stop() == 0
    platform.produce([event("r-last")])
    platform.wait_for_offsets(len(events) + 1)
    assert frozen.alive


def test_a_rightful_owner_whom_postgres_runs_away_from_looks_again_and_goes_on(
    platform: Platform,
) -> None:
    events = history(3_000, seed=55)
    # Both are given every partition, by groups that don't know of each other: whoever loads first
    # makes the other's compare-and-swap fail.
    ours, theirs = (
        platform.worker(DATA_PLATFORM_BATCH_ROWS="50", DATA_PLATFORM_GROUP=f"{platform.group}-{n}")
        for n in "12"
    )
    wait_until(lambda: placed(ours) and placed(theirs), 30, "all partitions for each")
    platform.produce(events)
    platform.wait_for_offsets(len(events))
    # Back to the beginning, behind the back of both.
    platform.execute("UPDATE analytics.load_offsets SET next_offset = 0 WHERE next_offset > 0")
    for number in range(6):
        last = event(f"r-last-{number}")
        platform.produce_raw([(last.key, last.value)], number)
        events.append(last)
    platform.wait_for_offsets(len(events))

    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)
    assert platform.dead_letters() == []
    assert said(ours, "place_lost") > 0
    assert said(theirs, "place_lost") > 0
    assert said(ours, "waiting") == said(theirs, "waiting") == 0  # no outage: nobody backs off
    assert ours.alive
    assert theirs.alive


def test_more_partitions_later_move_keys_and_versions_still_decide(platform: Platform) -> None:
    first = history(300, seed=54)
    worker = platform.worker()
    platform.produce([one for one in first if one.fact[1] == 1])
    begun = sum(one.fact[1] == 1 for one in first)
    platform.wait_for_offsets(begun)
    admin = AdminClient({"bootstrap.servers": platform.bootstrap_servers})
    admin.create_partitions([NewPartitions(platform.topic, 11)])[platform.topic].result(10)
    wait_until(
        lambda: len(admin.list_topics(platform.topic, 5).topics[platform.topic].partitions) == 11,
        20,
        "the new partitions",
    )
    before = time.monotonic()
    platform.produce([one for one in first if one.fact[1] > 1])
    platform.produce(first)  # all of it again: each key's version 1 comes in its new partition
    total = len(first) + len(first)
    platform.wait_for_offsets(total)
    assert time.monotonic() - before < 40  # topic.metadata.refresh.interval.ms, and a margin
    assert platform.facts() == expected_facts(first)
    assert platform.states() == expected_states(first)
    moved = platform.rows(
        "SELECT count(*) FROM (SELECT FROM analytics.fct_reservation_events"
        " GROUP BY reservation_id HAVING count(DISTINCT kafka_partition) > 1) AS moved"
    )
    assert moved[0][0] > 0
    assert json.loads(platform.command("status", "--json").stdout)["lag_rows"] == 0
    assert worker.alive
