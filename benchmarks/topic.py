"""A topic full of events as the service writes them, for all who load it."""

import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from confluent_kafka import Producer

from benchmarks import events

# A reservation is completed so many reservations after it was held: in another batch, as in life.
HELD_FOR_RESERVATIONS = 20_000
FIRST_MS = 1_772_000_000_000
RESERVATIONS_PER_MS = 5
FLUSH_TIMEOUT_S = 120.0
SETTINGS = {
    "compression.type": "lz4",
    "linger.ms": 20,
    "partitioner": "murmur2",
    "queue.buffering.max.messages": 500_000,
}


@dataclass(frozen=True)
class Filled:
    """What a topic has: events of so many reservations, and how large values are in the mean."""

    events: int
    reservations: int
    value_bytes: float


class Record(NamedTuple):
    """A record to produce, and which event of which reservation it tells."""

    reservation: str
    version: int
    key: bytes
    value: bytes


def uuid7(milliseconds: int, dice: random.Random) -> str:
    """Return an id as the service makes it: ordered by time."""
    chance = dice.getrandbits(74)
    return str(
        UUID(int=milliseconds << 80 | 7 << 76 | chance >> 62 << 64 | 2 << 62 | chance % 2**62)
    )


def fill(
    bootstrap_servers: str,
    topic: str,
    count: int,
    *,
    first_ms: int = FIRST_MS,
    shape: Callable[[str], str] = str,
    key_of: Callable[[str], str] = str,
) -> Filled:
    """Produce `count` events: each reservation held and, later, completed.

    Args:
        bootstrap_servers: Kafka's address.
        topic: one that exists.
        count: how many events.
        first_ms: the time in the first reservation's id; others make other reservations.
        shape: turns an event's template into what the records are to hold.
        key_of: turns a reservation's id into a record's key.
    """
    producer = Producer({**SETTINGS, "bootstrap.servers": bootstrap_servers})
    produced = size_bytes = reservations = 0
    for record in records(count, first_ms=first_ms, shape=shape, key_of=key_of):
        _produce(producer, topic, record.key, record.value)
        produced, size_bytes = produced + 1, size_bytes + len(record.value)
        reservations += record.version == 1
    if producer.flush(FLUSH_TIMEOUT_S):
        raise TimeoutError(f"{topic} was not filled within {FLUSH_TIMEOUT_S:g} s")
    return Filled(produced, reservations, round(size_bytes / produced, 1))


def records(
    count: int,
    *,
    first_ms: int = FIRST_MS,
    held_for: int = HELD_FOR_RESERVATIONS,
    shape: Callable[[str], str] = str,
    key_of: Callable[[str], str] = str,
) -> Iterator[Record]:
    """Yield `count` events as `fill` produces them, a reservation completed `held_for` later."""
    dice = random.Random(count)  # noqa: S311 - the same events each time
    texts = [shape(row[2]) for row in events.templates()]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    held: deque[tuple[str, str]] = deque()
    reservations = 0
    for _ in range(count):
        if len(held) > held_for or reservations >= count - count // 2:
            version, (name, template) = 2, held.popleft()
        else:
            version, reservations = 1, reservations + 1
            name = uuid7(first_ms + reservations // RESERVATIONS_PER_MS, dice)
            template, completed = dice.choice(pairs)
            held.append((name, completed))
        value = template.replace(events.TEMPLATE_ID, name).encode()
        yield Record(name, version, key_of(name).encode(), value)


def _produce(producer: Producer, topic: str, key: bytes, value: bytes) -> None:
    until = time.monotonic() + FLUSH_TIMEOUT_S
    while time.monotonic() < until:
        try:
            producer.produce(topic, value, key)
        except BufferError:
            producer.poll(0.1)
        else:
            return
    raise TimeoutError(f"{topic} takes no more records")
