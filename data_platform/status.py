"""How far the tables are behind Kafka.

`lag_rows` counts offsets between what is loaded and the last that a `read_committed` reader may
see. `lag_seconds` is the time since the oldest record not yet loaded came into Kafka (its
timestamp), 0 when there is none: a partition with nothing but transaction markers left is not
late.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass
from typing import Any

import psycopg
from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from data_platform import sql
from data_platform.loader import APPLICATION_NAME, CONNECT_TIMEOUT_S

KAFKA_TIMEOUT_S = 10.0
PEEK_TIMEOUT_S = 5.0
EARLIEST = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
LATEST = OffsetSpec.latest()  # type: ignore[no-untyped-call]


class StatusError(Exception):
    """Kafka doesn't tell what is asked for; the message is for the operator."""


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
    """The whole platform. `problems` are faults that stop a partition, in words."""

    partitions: Sequence[PartitionStatus]
    lag_rows: int
    lag_seconds: float
    dead_letters: int
    problems: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """The shape that `status --json` promises."""
        return asdict(self)


def read_status(
    database_url: str,
    client: Mapping[str, Any],
    consumer: Mapping[str, Any],
    topics: Sequence[str],
) -> Status:
    """Compare Postgres' offsets with Kafka's.

    Raises:
        psycopg.Error: Postgres can't be reached, or is not migrated.
        StatusError, KafkaException: Kafka doesn't answer.
    """
    admin = AdminClient(dict(client))
    partitions: list[PartitionStatus] = []
    problems: list[str] = []
    with psycopg.connect(
        database_url,
        autocommit=True,
        application_name=f"{APPLICATION_NAME} status",
        connect_timeout=CONNECT_TIMEOUT_S,
    ) as connection:
        connection.execute(sql.STATUS_SESSION)
        for topic in topics:
            rows = connection.execute(sql.READ_OFFSETS, {"topic": topic}).fetchall()
            stored = {row[0]: (row[1], row[2]) for row in rows}
            found, faults = _topic_status(admin, topic, stored)
            partitions += found
            problems += faults
        counted = connection.execute(sql.COUNT_DEAD_LETTERS).fetchone()
    return Status(
        partitions,
        sum(partition.lag_rows for partition in partitions),
        _lag_seconds([p for p in partitions if p.lag_rows], consumer),
        counted[0] if counted else 0,
        problems,
    )


def _topic_status(
    admin: AdminClient, topic: str, stored: Mapping[int, tuple[int, str]]
) -> tuple[list[PartitionStatus], list[str]]:
    described = admin.describe_topics(TopicCollection([topic]), request_timeout=KAFKA_TIMEOUT_S)
    try:
        description = _result(described[topic])
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return [], [f"topic {topic} doesn't exist"]
        raise
    numbers = sorted(partition.id for partition in description.partitions)
    first = _offsets(admin, topic, numbers, EARLIEST)
    end = _offsets(admin, topic, numbers, LATEST)
    partitions, problems = [], []
    for number in numbers:
        next_offset, topic_id = stored.get(number, (0, str(description.topic_id)))
        lag = max(0, end[number] - max(next_offset, first[number]))
        partitions.append(PartitionStatus(topic, number, next_offset, end[number], lag))
        name = f"{topic} partition {number}"
        if topic_id != str(description.topic_id) and next_offset > 0:
            problems.append(f"{name}: the topic was made anew under its old name")
        elif first[number] > next_offset:
            problems.append(
                f"{name}: records {next_offset} to {first[number] - 1} were deleted unloaded"
            )
        elif end[number] < next_offset:
            problems.append(f"{name}: ends at {end[number]}, before what was loaded")
    return partitions, problems


def _offsets(
    admin: AdminClient, topic: str, numbers: Sequence[int], which: OffsetSpec
) -> dict[int, int]:
    asked = admin.list_offsets(
        {TopicPartition(topic, number): which for number in numbers},
        isolation_level=IsolationLevel.READ_COMMITTED,
        request_timeout=KAFKA_TIMEOUT_S,
    )
    return {place.partition: _result(future).offset for place, future in asked.items()}


def _result(future: Any) -> Any:
    try:
        return future.result(KAFKA_TIMEOUT_S + 1)
    except FutureTimeoutError as error:
        raise StatusError(f"Kafka didn't answer within {KAFKA_TIMEOUT_S:g} s") from error


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
