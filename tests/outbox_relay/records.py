"""Reads a whole topic back, as any consumer would see it."""

import time
from typing import Literal, NamedTuple

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from tests.waiting import wait_until

TIMEOUT_S = 20.0


class Record(NamedTuple):
    """A record of Kafka."""

    partition: int
    offset: int
    key: str
    value: bytes
    headers: dict[str, str]


def read_topic(
    bootstrap_servers: str,
    topic: str,
    *,
    isolation: Literal["read_committed", "read_uncommitted"] = "read_committed",
    timeout_s: float = TIMEOUT_S,
) -> list[Record]:
    """Return all records that are in `topic` now, in order within each partition.

    Under `read_committed` an open transaction hides itself and what is behind it in its partitions.
    """
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "test-reader",
            # Behind the last record lies a transaction's end, for which a broker would wait.
            "fetch.wait.max.ms": 50,
            "enable.auto.commit": False,
            "isolation.level": isolation,
            # A broker that a test has killed is no news on the terminal.
            "log_level": 0,
        }
    )
    try:
        (ends,) = wait_until(lambda: _ends(consumer, topic), timeout_s, f"the ends of {topic}")
        left = {number for number, end in ends.items() if end > 0}
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in left])
        records = []
        deadline = time.monotonic() + timeout_s
        while left:
            assert time.monotonic() < deadline, f"the end of {topic} was not reached"
            messages = consumer.consume(10_000, timeout=0.5)
            for message in messages:
                error = message.error()
                assert error is None, error
                partition, offset = message.partition(), message.offset()
                assert partition is not None
                assert offset is not None
                records.append(
                    Record(
                        partition,
                        offset,
                        (message.key() or b"").decode(),
                        message.value() or b"",
                        _texts(message.headers()),
                    )
                )
            positions = consumer.position([TopicPartition(topic, number) for number in left])
            left -= {at.partition for at in positions if at.offset >= ends[at.partition]}
    finally:
        consumer.close()
    return records


def _ends(consumer: Consumer, topic: str) -> list[dict[int, int]]:
    """Partition → the offset behind its last record; nothing while a broker is about to fail."""
    try:
        partitions = consumer.list_topics(topic, timeout=TIMEOUT_S).topics[topic].partitions
        ends = {
            number: consumer.get_watermark_offsets(
                TopicPartition(topic, number), timeout=TIMEOUT_S
            )[1]
            for number in partitions
        }
    except KafkaException:
        return []
    return [ends]


def _texts(headers: object) -> dict[str, str]:
    assert headers is None or isinstance(headers, list)
    return {name: value.decode() for name, value in headers or []}
