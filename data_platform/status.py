"""How far the tables are behind Kafka.

`lag_rows` counts offsets between what is loaded and the last that a `read_committed` reader may
see. `lag_seconds` is the time since the oldest record not yet loaded came into Kafka (its
timestamp), 0 when there is none: a partition with nothing but transaction markers left is not
late.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from confluent_kafka import Consumer, TopicPartition

from data_platform import sql
from data_platform.errors import KafkaTroubleError
from data_platform.loader import APPLICATION_NAME, CONNECT_TIMEOUT_S
from data_platform.topics import StoredOffset, Topics

PEEK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class PartitionStatus:
    """How far one partition is."""

    topic: str
    partition: int
    next_offset: int
    end_offset: int
    lag_rows: int


@dataclass(frozen=True)
class Status:
    """The whole platform, as `status --json` has it.

    `problems` are faults that stop a partition, in words.
    """

    partitions: Sequence[PartitionStatus]
    lag_rows: int
    lag_seconds: float
    dead_letters: int
    problems: Sequence[str]


def read_status(
    database_url: str, topics: Topics, consumer: Mapping[str, Any], names: Sequence[str]
) -> Status:
    """Compare Postgres' offsets with Kafka's.

    Raises:
        psycopg.Error: Postgres can't be reached, or is not migrated.
        KafkaException: Kafka doesn't answer.
    """
    partitions: list[PartitionStatus] = []
    problems: list[str] = []
    with psycopg.connect(
        database_url,
        autocommit=True,
        application_name=f"{APPLICATION_NAME} status",
        connect_timeout=CONNECT_TIMEOUT_S,
    ) as connection:
        connection.execute(sql.STATUS_SESSION)
        for name in names:
            rows = connection.execute(sql.READ_OFFSETS, {"topic": name}).fetchall()
            stored = {row[0]: StoredOffset(row[1], row[2]) for row in rows}
            try:
                _add_topic(name, topics, stored, partitions, problems)
            except KafkaTroubleError as error:
                problems.append(str(error))
        counted = connection.execute(sql.COUNT_DEAD_LETTERS).fetchone()
    return Status(
        partitions,
        sum(partition.lag_rows for partition in partitions),
        _lag_seconds([p for p in partitions if p.lag_rows], consumer),
        counted[0] if counted else 0,
        problems,
    )


def _add_topic(
    name: str,
    topics: Topics,
    stored: Mapping[int, StoredOffset],
    partitions: list[PartitionStatus],
    problems: list[str],
) -> None:
    topic = topics.look(name)
    for number, span in topic.spans.items():
        place = stored.get(number, StoredOffset(0, topic.topic_id))
        lag = max(0, span.end - max(place.next_offset, span.first))
        partitions.append(PartitionStatus(name, number, place.next_offset, span.end, lag))
        if fault := topic.fault(number, place):
            problems.append(f"{name} partition {number}: {fault}")


def _lag_seconds(late: Sequence[PartitionStatus], properties: Mapping[str, Any]) -> float:
    """Read the first record not yet loaded of each late partition; the oldest one counts."""
    if not late:
        return 0.0
    consumer = Consumer(dict(properties))
    try:
        consumer.assign([TopicPartition(p.topic, p.partition, p.next_offset) for p in late])
        waiting = {(p.topic, p.partition) for p in late}
        oldest_ms = float("inf")
        until = time.monotonic() + PEEK_TIMEOUT_S
        while waiting and (left_s := until - time.monotonic()) > 0:
            for message in consumer.consume(100, min(left_s, 0.1)):
                place = (str(message.topic()), int(message.partition() or 0))
                if message.error() is None and place in waiting:
                    oldest_ms = min(oldest_ms, message.timestamp()[1])
                waiting.discard(place)
    finally:
        consumer.close()
    return max(0.0, round(time.time() - oldest_ms / 1000, 3)) if oldest_ms < float("inf") else 0.0
