"""The Kafka side: which partitions we have, where they begin, what comes next.

Guarantees: a partition is read only from the offset that Postgres has for it, and only while it
belongs to the topic that Postgres has loaded from and still holds that offset; otherwise that
partition stops, loudly, and the others go on. What was fetched and not loaded is forgotten
whole (`forget`), never skipped: the partition is then placed again by Postgres' offset.

The group grants partitions (`_granted`); we hand one to librdkafka only once its offset is known
(`_placed`). In between there is nothing to pause: an outage of Postgres leaves partitions granted
but not placed, and polling keeps the membership alive.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from data_platform.batch import Slice
from data_platform.errors import Cure, PlaceLostError, cure_of
from data_platform.topics import StoredOffset, Topics, topic_id_in

if TYPE_CHECKING:
    from concurrent.futures import Future

# A transaction marker alone moves the offset at most this often.
MARKER_INTERVAL_S = 0.2
# While Kafka is away and nothing comes, ask so often whether it is back.
PROBE_INTERVAL_S = 1.0
# Who isn't a member that long after it asked to be one, says the group twice, never will be.
JOIN_INTERVAL_S, JOIN_ANSWERS = 4.0, 2
# A broker that was frozen and no longer leads tells of old ends until it knows.
SURE_AFTER_S, SURE_INTERVAL_S = 3.0, 0.3
CHUNK_RECORDS = 500
# An answer that the topic is still the same vouches for later batches, too, for as long as nobody
# can have made it anew and filled it up to our offset: no partition takes this many records a
# second, and no answer counts for longer than VOUCHED_S. A question for each batch would cost a
# busy worker 20 MiB an hour: confluent-kafka 2.16 never frees the id in the answer.
FASTEST_FILL_PER_S = 1_000_000
VOUCHED_S = 10.0

LOST_PLACE = frozenset(
    {KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE}  # noqa: SLF001 - public names
)

log = structlog.get_logger()


class Partition(NamedTuple):
    """A partition's full name."""

    topic: str
    partition: int


@dataclass
class Place:
    """Where we stand in a partition.

    Attributes:
        taken: up to here `fetch` has handed everything out; the next slice begins here.
        reached: up to here we have read.
        end: where the partition ended when we came upon its end last.
    """

    topic_id: str
    taken: int
    reached: int
    end: int = -1

    @property
    def at_end(self) -> bool:
        """Whether there was nothing behind `reached` when Kafka was asked last."""
        return self.end >= self.reached


# (topic, topic id, partition numbers) → where Postgres stands in each of them.
Claim = Callable[[str, str, Sequence[int]], Mapping[int, StoredOffset]]


class Source:
    """The records of `names` that this member of the group has to load.

    Args:
        consumer: librdkafka properties of the consumer.
        new_group: those to try first, by KIP-848's group protocol; a broker that doesn't know it
            makes us join by `consumer`.
        topics: asks Kafka about topics.
        names: the topics to consume.
        batch_rows: a batch has about this many records at most,
        batch_bytes: and about this many bytes of keys and values.
    """

    def __init__(
        self,
        consumer: Mapping[str, Any],
        topics: Topics,
        names: Sequence[str],
        *,
        batch_rows: int,
        batch_bytes: int,
        new_group: Mapping[str, Any] | None = None,
    ) -> None:
        self._group = str(consumer["group.id"])
        self._classic = consumer if new_group else None
        self._consumer = self._new_consumer(new_group or consumer)
        self._topics = topics
        self._names = list(names)
        self._batch_rows = batch_rows
        self._batch_bytes = batch_bytes
        self._subscribed = False
        self._granted: set[Partition] = set()
        self._placed: dict[Partition, Place] = {}
        self._slices: dict[Partition, Slice] = {}
        self._described: dict[str, Future[Any]] = {}
        self._asked_at_s = 0.0
        # When the last question after (a topic, its id) was begun that was answered by yes.
        self._vouched_at_s: dict[tuple[str, str], float] = {}
        self._markers_at = 0.0
        self._away = False
        self._copy_fails = False
        self._probe: Future[Any] | None = None
        self._probe_at = 0.0
        self._membership: Future[Any] | None = None
        self._membership_at = 0.0
        self._strange = 0
        self._suspected_since_s: dict[Partition, float] = {}
        self._suspects_at_s = 0.0
        self.stopped: dict[Partition, str] = {}

    def _new_consumer(self, properties: Mapping[str, Any]) -> Consumer:
        return Consumer(
            {**properties, "error_cb": self._on_client_error, "on_commit": self._on_commit}
        )

    # ---- which partitions, and where they begin

    def settle(self, claim: Claim) -> None:
        """Join the group once the topics exist, and place what was granted.

        Raises:
            KafkaTroubleError, KafkaException: a topic doesn't exist or Kafka doesn't answer.
        """
        if not self._subscribed:
            for name in self._names:
                self._topics.topic_id(name)
            self._consumer.subscribe(
                self._names, on_assign=self._on_assign, on_revoke=self._on_revoke
            )
            self._subscribed = True
            self._membership_at = time.monotonic() + JOIN_INTERVAL_S
        for name in self._names:
            waiting = [p for p in sorted(self._granted) if p.topic == name and self._due(p)]
            if waiting:
                self._place(name, waiting, claim)

    @property
    def unsettled(self) -> bool:
        """Whether `settle` has anything to do."""
        return not self._subscribed or any(map(self._due, self._granted))

    def _due(self, partition: Partition) -> bool:
        if partition in self._placed or partition in self.stopped:
            return False
        return partition not in self._suspected_since_s or time.monotonic() >= self._suspects_at_s

    def _place(self, name: str, partitions: Sequence[Partition], claim: Claim) -> None:
        topic = self._topics.look(name)
        stored = claim(name, topic.topic_id, [partition.partition for partition in partitions])
        begin = {}
        for partition in partitions:
            offset = stored[partition.partition]
            fault = topic.fault(partition.partition, offset)
            if not fault:
                self._suspected_since_s.pop(partition, None)
                begin[partition] = offset.next_offset
            elif self._is_sure_of_fault(partition):
                log.error("partition_stopped", **partition._asdict(), fault=fault)
                self.stopped[partition] = fault
        self._consumer.incremental_assign([TopicPartition(*p, at) for p, at in begin.items()])
        self._placed |= {p: Place(topic.topic_id, at, at) for p, at in begin.items()}
        log.info("partitions_placed", topic=name, at={p.partition: at for p, at in begin.items()})

    def _is_sure_of_fault(self, partition: Partition) -> bool:
        """Whether it was found again and again; else it is looked at again a little later."""
        now = time.monotonic()
        since_s = self._suspected_since_s.setdefault(partition, now)
        self._suspects_at_s = now + SURE_INTERVAL_S
        return now - since_s >= SURE_AFTER_S

    def forget(self) -> None:
        """Drop what was read and not loaded.

        The partitions are placed again, by Postgres' offsets, with the next `settle`.
        """
        placed = [TopicPartition(*partition) for partition in self._placed]
        self._placed.clear()
        self._slices.clear()
        self._vouched_at_s.clear()
        if placed:
            self._consumer.incremental_unassign(placed)

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # An empty assignment acknowledges the rebalance; `settle` assigns with offsets.
        consumer.incremental_assign([])
        self._granted.update(Partition(p.topic, p.partition) for p in partitions)
        if partitions:  # a member, then: who is fenced later joins again by itself
            self._membership_at = math.inf

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        revoked = [Partition(p.topic, p.partition) for p in partitions]
        placed = [TopicPartition(*p) for p in revoked if p in self._placed]
        consumer.incremental_unassign(placed)
        for partition in revoked:
            self._granted.discard(partition)
            self._placed.pop(partition, None)
            self._slices.pop(partition, None)
            self.stopped.pop(partition, None)
            self._suspected_since_s.pop(partition, None)
        log.info("partitions_revoked", partitions=[p.partition for p in revoked])

    # ---- what comes next

    def fetch(self, wait_s: float) -> list[Slice]:
        """Return what is there, at once; wait up to `wait_s` for the first record.

        Empty when nothing came. After an exception call `forget`: records may be lost here.
        """
        self._ask_whether_back()
        self._ask_whether_joined()
        self._slices = {}
        messages = self._consumer.consume(1, wait_s)
        rows = size_bytes = 0
        while messages:
            size_bytes += self._take(messages)
            rows += len(messages)
            if rows >= self._batch_rows or size_bytes >= self._batch_bytes:
                break
            messages = self._consumer.consume(min(CHUNK_RECORDS, self._batch_rows - rows), 0)
        slices = self._read_slices() or self._moved_by_markers()
        for part in slices:
            self._placed[Partition(part.topic, part.partition)].taken = part.next_offset
        # Asked after the records came, so that the answer vouches for them; `confirm` takes it.
        self._asked_at_s = time.monotonic()
        doubtful = {part.topic for part in slices if not self._is_vouched_for(part)}
        self._described = {name: self._topics.describe(name) for name in doubtful}
        return slices

    def _is_vouched_for(self, part: Slice) -> bool:
        """Whether an earlier answer still tells that this came from the topic we load from."""
        since_s = self._asked_at_s - self._vouched_at_s.get((part.topic, part.topic_id), -math.inf)
        return since_s < min(VOUCHED_S, part.first_offset / FASTEST_FILL_PER_S)

    def confirm(self, slices: Sequence[Slice]) -> None:
        """Make sure that `slices` came from the topics that Postgres has loaded from.

        A topic made anew under its old name gives no error while the offset exists in it.

        Raises:
            PlaceLostError: they did not.
            KafkaTroubleError, KafkaException: Kafka doesn't tell.
        """
        ids = {name: topic_id_in(asked, name) for name, asked in self._described.items()}
        for part in slices:
            topic_id = ids.get(part.topic, part.topic_id)
            if topic_id != part.topic_id:
                raise PlaceLostError(f"{part.topic} is now {topic_id}, not {part.topic_id}")
        self._vouched_at_s |= dict.fromkeys(ids.items(), self._asked_at_s)

    def _take(self, messages: Sequence[Message]) -> int:
        """Put records into their slices; return their size in bytes."""
        # A plain tuple finds a Partition, too, and costs a third of one: this is done per record.
        slices = cast("dict[tuple[str | None, int | None], Slice]", self._slices)
        size_bytes = 0
        for message in messages:
            error = message.error()
            if error is not None:
                self._take_error(partition_of(message), error, int(message.offset() or 0))
                continue
            part = slices.get((message.topic(), message.partition()))
            if part is None:
                part = self._begin_slice(partition_of(message))
                if part is None:  # fetched just before the partition was taken away
                    continue
            part.messages.append(message)
            size_bytes += len(message)
        return size_bytes

    def _begin_slice(self, partition: Partition) -> Slice | None:
        place = self._placed.get(partition)
        if place is None:
            return None
        self._note_answer()
        part = Slice(*partition, place.topic_id, place.taken, place.taken)
        self._slices[partition] = part
        return part

    def _read_slices(self) -> list[Slice]:
        """Return what was read, each slice up to where we have reached."""
        for partition, part in self._slices.items():
            place = self._placed[partition]
            place.reached = max(place.reached, int(part.messages[-1].offset() or 0) + 1)
            part.next_offset = place.reached
        return list(self._slices.values())

    def _take_error(self, partition: Partition, error: KafkaError, offset: int) -> None:
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - a public name
            self._note_answer()
            place = self._placed.get(partition)
            if place is not None:
                place.reached = max(place.reached, offset)
                place.end = offset
        elif self._classic is not None and _is_unknown_to_the_broker(error):
            self._join_the_classic_way(error.str())
        elif error.code() in LOST_PLACE:
            raise PlaceLostError(f"{partition}: {error.str()}")
        else:
            self._on_client_error(error)

    def _moved_by_markers(self) -> list[Slice]:
        """Slices without records: after the last record a transaction's marker takes an offset."""
        now = time.monotonic()
        if now < self._markers_at:
            return []
        self._markers_at = now + MARKER_INTERVAL_S
        return [
            Slice(*partition, place.topic_id, place.taken, place.reached)
            for partition, place in self._placed.items()
            if place.reached > place.taken
        ]

    @property
    def at_end(self) -> bool:
        """Whether all that was granted is placed, and read to its end."""
        return all(place.at_end for place in self._placed.values()) and not any(
            map(self._due, self._granted)
        )

    def wait(self, wait_s: float) -> None:
        """Stay a member of the group for a moment. Nothing may be placed."""
        for message in self._consumer.consume(1, wait_s):
            error = message.error()
            if error is not None:
                self._take_error(Partition("", -1), error, 0)
        self._ask_whether_back()
        self._ask_whether_joined()

    # ---- afterwards

    def commit(self, slices: Sequence[Slice]) -> None:
        """Tell Kafka what Postgres has, for tools that watch the lag."""
        offsets = [TopicPartition(part.topic, part.partition, part.next_offset) for part in slices]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._on_commit(error.args[0], offsets)

    def _on_commit(self, error: KafkaError | None, _offsets: Sequence[TopicPartition]) -> None:
        # Postgres' offsets are the true ones; a rebalance makes many of these fail in a row.
        if error is not None and not self._copy_fails:
            log.info("kafka_offset_copy_failed", error=error.str())
        self._copy_fails = error is not None

    def close(self) -> None:
        """Leave the group, so that the others take over at once."""
        self._consumer.close()

    def _on_client_error(self, error: KafkaError) -> None:
        # Another cluster may answer at the same address next time.
        self._vouched_at_s.clear()
        trouble = KafkaException(error)
        if cure_of(trouble) is Cure.END:
            raise trouble  # called by librdkafka, out of `consume`
        if not self._away:
            log.warning("kafka_trouble", error=error.str(), code=error.name())
        self._away = True

    def _ask_whether_back(self) -> None:
        if not self._away:
            return
        if self._probe is None and time.monotonic() >= self._probe_at:
            self._probe = self._topics.describe(self._names[0])
            self._probe_at = time.monotonic() + PROBE_INTERVAL_S
        if self._probe is not None and self._probe.done():
            if self._probe.exception() is None:
                self._note_answer()
            self._probe = None

    def _ask_whether_joined(self) -> None:
        """Join the classic way when the group goes on not knowing us.

        Before Kafka 4.0 a broker doesn't offer KIP-848's requests; librdkafka 2.16 then waits for
        ever and says nothing. A broker that is away doesn't answer this question either.
        """
        if self._classic is None or not self._subscribed or self._granted:
            return
        if self._membership is None:
            if time.monotonic() >= self._membership_at:
                self._membership = self._topics.describe_group(self._group)
                self._membership_at = time.monotonic() + JOIN_INTERVAL_S
        elif self._membership.done():
            answer, self._membership = self._membership, None
            members = None if answer.exception() else answer.result().members
            ours = self._consumer.memberid()
            strange = members is not None and all(member.member_id != ours for member in members)
            self._strange = self._strange + 1 if strange else 0
            if self._strange == JOIN_ANSWERS:
                self._join_the_classic_way("the group doesn't get to know this member")

    def _join_the_classic_way(self, cause: str) -> None:
        assert self._classic is not None, "once"  # noqa: S101
        log.info("classic_group", cause=cause)
        self._consumer.close()
        self._consumer, self._classic = self._new_consumer(self._classic), None
        self._subscribed = False

    def _note_answer(self) -> None:
        if self._away:
            log.info("kafka_answers_again")
        self._away = False


def partition_of(message: Message) -> Partition:
    """Return the partition that a message came from."""
    return Partition(str(message.topic()), int(message.partition() or 0))


def _is_unknown_to_the_broker(error: KafkaError) -> bool:
    # There is no way to ask before: librdkafka tells it as a fatal error, in words.
    return error.code() == KafkaError._FATAL and "not supported" in error.str()  # noqa: SLF001
