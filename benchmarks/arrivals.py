"""What has arrived in a topic: when, how much, and whether it is what was sent.

While a contender runs, only the topic's ends are asked for, so that no reader takes its CPU.
Afterwards every record is read back, as a `read_committed` consumer sees it, and each reservation's
versions are followed.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self, TypeVar

from confluent_kafka import Consumer, IsolationLevel, KafkaError, Message, TopicPartition
from confluent_kafka.admin import OffsetSpec  # type: ignore[attr-defined]  # re-exported without a word

from outbox_relay.producer import make_admin

REQUEST_TIMEOUT_S = 10.0
# The last stretch is watched closely, the way there is not disturbed.
ASK_AT_LEAST_EVERY_S = 0.2
ASK_AT_MOST_EVERY_S = 0.003
REMAINING_SHARE = 0.2
# Nothing more for so long: the end, if all is there (a transaction's markers count as offsets too).
QUIET_S = 1.0
STALLED_S = 30.0
READ_TIMEOUT_S = 300.0
READ_BATCH = 10_000
READ_WAIT_S = 0.1
MILLISECONDS = 1000.0
# Where the version stands in a payload that the service has written: behind `"id":"<36 letters>:`.
VERSION_AT = len('{"specversion":"1.0","id":"') + 36 + 1

Offsets = Mapping[int, int]
T = TypeVar("T")
LATEST = OffsetSpec.latest()  # type: ignore[no-untyped-call]


@dataclass
class Verdict:
    """What the records of a run are: `expected` events, each reservation's versions from 1 up.

    Attributes:
        first_append_s: when the broker took the first record, in seconds of the wall clock.
        last_append_s: the same for the last.
    """

    expected: int
    records: int = 0
    doubled: int = 0
    reordered: int = 0
    first_append_s: float = float("inf")
    last_append_s: float = 0.0
    _versions: dict[bytes, int] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Events that are not there."""
        return self.expected - (self.records - self.doubled)

    @property
    def keys(self) -> int:
        """Reservations that there were events of."""
        return len(self._versions)

    @property
    def right(self) -> bool:
        """Whether every event is there once and in order."""
        return not (self.lost or self.doubled or self.reordered)

    def add(self, key: bytes, payload: bytes, append_s: float) -> None:
        """Take the next record of a partition.

        A version that has been passed counts as doubled, one that leaves a gap as reordered (the
        one in the gap is then doubled or lost).
        """
        version = int(payload[VERSION_AT : payload.index(b'"', VERSION_AT)])
        known = self._versions.get(key, 0)
        self.records += 1
        if version <= known:
            self.doubled += 1
        else:
            self.reordered += version != known + 1
            self._versions[key] = version
        self.first_append_s = min(self.first_append_s, append_s)
        self.last_append_s = max(self.last_append_s, append_s)

    def summary(self) -> dict[str, int]:
        """Return the counts for the result."""
        return {"lost": self.lost, "doubled": self.doubled, "reordered": self.reordered}


class Arrivals:
    """Looks at one topic from its end at the beginning on."""

    def __init__(self, bootstrap_servers: str, topic: str, partitions: int) -> None:
        self.topic = topic
        self._bootstrap_servers = bootstrap_servers
        self._admin = make_admin({"bootstrap.servers": bootstrap_servers})
        self._partitions = [TopicPartition(topic, number) for number in range(partitions)]
        self.begin = self.ends()

    def ends(self, isolation: IsolationLevel = IsolationLevel.READ_COMMITTED) -> Offsets:
        """Return each partition's end, as a `read_committed` consumer sees it if not told else."""
        futures = self._admin.list_offsets(
            dict.fromkeys(self._partitions, LATEST),
            isolation_level=isolation,
            request_timeout=REQUEST_TIMEOUT_S,
        )
        return {
            partition.partition: future.result(REQUEST_TIMEOUT_S).offset
            for partition, future in futures.items()
        }

    def arrived(self) -> int:
        """Return how many offsets have come since the beginning."""
        return sum(self.ends().values()) - sum(self.begin.values())

    def await_first(self, timeout_s: float, check_alive: Callable[[], None]) -> None:
        """Wait for the first record, committed or not: what came before is getting ready.

        Raises:
            TimeoutError: nothing came.
        """
        deadline = time.monotonic() + timeout_s
        while self.ends(IsolationLevel.READ_UNCOMMITTED) == self.begin:
            check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no record after {timeout_s:.0f} s")
            time.sleep(ASK_AT_MOST_EVERY_S)

    def watch(
        self,
        expected: int,
        timeout_s: float,
        check_alive: Callable[[], None],
        at_end: Callable[[], T],
    ) -> tuple[float, T]:
        """Wait until `expected` events are there and nothing more comes.

        Returns:
            The wall clock's time at which the last of them was there, and what `at_end` gave then.

        Raises:
            TimeoutError: `timeout_s` were not enough, or nothing came for STALLED_S.
        """
        began = changed = time.monotonic()
        count, end = 0, None
        while True:
            check_alive()
            now, found = time.monotonic(), self.arrived()
            if found != count:
                count, changed = found, now
                end = (time.time(), at_end()) if count >= expected else None
            if end is not None and now - changed > QUIET_S:
                return end
            if now - began > timeout_s or (end is None and now - changed > STALLED_S):
                raise TimeoutError(f"{count} of {expected} events after {now - began:.0f} s")
            time.sleep(_pause_s(count, expected, now - began))

    def verify(self, expected: int) -> Verdict:
        """Read everything since the beginning and judge it.

        Raises:
            TimeoutError: the records could not be read in READ_TIMEOUT_S.
        """
        verdict = Verdict(expected)
        with Reader(self._bootstrap_servers, self.topic, self.begin) as reader:
            for message in reader.until_end():
                key, value = message.key(), message.value()
                assert key is not None and value is not None  # noqa: S101, PT018 - our own records
                verdict.add(key, value, message.timestamp()[1] / MILLISECONDS)
        return verdict


class Reader:
    """A consumer of all partitions of a topic from given offsets on, of what is committed."""

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str,
        begin: Offsets,
        *,
        isolation: str = "read_committed",
    ) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "benchmark",
                "enable.auto.commit": False,
                "isolation.level": isolation,
                "auto.offset.reset": "error",
                "enable.partition.eof": True,
                "log_level": 0,
            }
        )
        self._partitions = len(begin)
        self._consumer.assign(
            [TopicPartition(topic, number, offset) for number, offset in begin.items()]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def poll(self, timeout_s: float) -> Message | None:
        """Return the next record as soon as it is there, or None after `timeout_s`."""
        message = self._consumer.poll(timeout_s)
        return None if message is None or _is_end(message) else message

    def until_end(self) -> Iterator[Message]:
        """Yield the records up to the end of a topic that nobody writes to any more."""
        ended: set[int | None] = set()
        deadline = time.monotonic() + READ_TIMEOUT_S
        while len(ended) < self._partitions:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the topic could not be read in {READ_TIMEOUT_S:g} s")
            for message in self._consumer.consume(READ_BATCH, READ_WAIT_S):
                if _is_end(message):
                    ended.add(message.partition())
                else:
                    yield message


def _is_end(message: Message) -> bool:
    error = message.error()
    if error is None:
        return False
    if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - confluent_kafka's public name
        return True
    raise RuntimeError(f"reading the topic failed: {error.str()}")


def _pause_s(count: int, expected: int, elapsed_s: float) -> float:
    """Return how long to leave the broker alone: a share of what the rest may take."""
    if not 0 < count < expected:
        return ASK_AT_MOST_EVERY_S if count else ASK_AT_MOST_EVERY_S * 3
    remaining_s = elapsed_s * (expected - count) / count
    return min(ASK_AT_LEAST_EVERY_S, max(ASK_AT_MOST_EVERY_S, REMAINING_SHARE * remaining_s))
