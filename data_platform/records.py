"""A topic's records between two offsets: read once, in each partition's order, in bounded memory.

Guarantees: what is yielded are all records of the given spans that a reader of the consumer's
isolation level sees, and nothing else; where Kafka no longer has them, or stops answering, an error
says so. No group is joined, no offset committed: workers don't notice.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from data_platform.batch import Slice
from data_platform.consumer import LOST_PLACE, Partition, partition_of
from data_platform.errors import KafkaTroubleError
from data_platform.topics import Span

CHUNK_RECORDS = 5_000
CHUNK_BYTES = 2**24
POLL_WAIT_S = 0.1
# Without a record or an end for so long, Kafka is away.
SILENCE_LIMIT_S = 60.0


def read(consumer: Mapping[str, Any], spans: Mapping[Partition, Span]) -> Iterator[list[Slice]]:
    """Yield the records of `spans`, at most about CHUNK_RECORDS and CHUNK_BYTES at a time.

    Args:
        consumer: librdkafka properties of a worker's consumer.
        spans: the offsets to read of each partition; `end` lies within what such a
            reader sees.

    Raises:
        KafkaTroubleError: records are gone, or nothing came for SILENCE_LIMIT_S.
        KafkaException: Kafka refuses.
    """
    waiting = {place: span for place, span in spans.items() if span.first < span.end}
    if not waiting:
        return
    reader = Consumer(dict(consumer))
    try:
        reader.assign([TopicPartition(*place, span.first) for place, span in waiting.items()])
        heard_at = time.monotonic()
        while waiting:
            slices: dict[Partition, Slice] = {}
            size_bytes = count = 0
            while messages := reader.consume(500, 0 if count else POLL_WAIT_S):
                heard_at = time.monotonic()
                for message in messages:
                    size_bytes += _take(message, waiting, slices)
                count += len(messages)
                if count >= CHUNK_RECORDS or size_bytes >= CHUNK_BYTES or not waiting:
                    break
            if slices:
                yield list(slices.values())
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > SILENCE_LIMIT_S:
                raise KafkaTroubleError(f"Kafka sends nothing of {sorted(waiting)}")
    finally:
        reader.close()


def _take(message: Message, waiting: dict[Partition, Span], slices: dict[Partition, Slice]) -> int:
    """Put a record into its slice and return its size in bytes; see where a partition is done."""
    place = partition_of(message)
    offset = int(message.offset() or 0)
    error = message.error()
    if error is not None:
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - a public name
            _reached(place, offset, waiting)
        elif error.code() in LOST_PLACE:
            raise KafkaTroubleError(f"{place}: {error.str()}")
        elif error.fatal() or not error.retriable():
            _raise_unless_away(error)
        return 0
    if place not in waiting:
        return 0
    if offset < waiting[place].end:
        part = slices.setdefault(place, Slice(*place, "", offset, offset))
        part.messages.append(message)
        part.next_offset = offset + 1
    _reached(place, offset + 1, waiting)
    return len(message.value() or b"") + len(message.key() or b"")


def _reached(place: Partition, offset: int, waiting: dict[Partition, Span]) -> None:
    if place in waiting and offset >= waiting[place].end:
        del waiting[place]


def _raise_unless_away(error: KafkaError) -> None:
    """A broker that is away comes back or not: SILENCE_LIMIT_S decides."""
    away = {KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE}  # noqa: SLF001
    if error.code() not in away:
        raise KafkaException(error)
