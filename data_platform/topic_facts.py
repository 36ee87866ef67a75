"""The topic's records against the facts, in both directions.

Guarantees: each good record has its fact, each bad one its dead letter, and each fact a record that
brought it; or the difference has a name. A batch of records is in memory at a time.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from confluent_kafka import IsolationLevel, Message

from data_platform import records, star
from data_platform import sql as loading
from data_platform import sql_reconcile as sql
from data_platform.batch import BadRecord, Row, Slice, decode
from data_platform.consumer import Partition, partition_of
from data_platform.differences import Difference
from data_platform.errors import KafkaTroubleError
from data_platform.events import ConcertEvent, Decoder
from data_platform.loader import Connection
from data_platform.outbox_flow import Outbox
from data_platform.topics import Span, StoredOffset, Topics

if TYPE_CHECKING:
    from data_platform.reconcile import Report

# Facts are counted in so many pieces at most, by their records' offsets.
BUCKETS = 10_000
NARROWEST_BUCKET = 1_000
BUCKETS_LOOKED_INTO = 100
# What the outbox has and the tables lack is looked for in the topic, as far as it isn't loaded:
# so many at a time, for each time all of it is read.
LOOKED_FOR_AT_ONCE = 50_000

COPY_TOLD = loading.COPY_EVENTS.replace("analytics.fct_reservation_events", "pg_temp.told_events")
PLACE = {"kafka_partition", "kafka_offset", "loaded_at", "occurred_on", "reservation_id", "version"}


class TopicFacts:
    """The topics as far as they are loaded, and what the tables have of them."""

    def __init__(
        self,
        tables: Connection,
        topics: Topics,
        consumer: Mapping[str, Any],
        decoders: Mapping[str, Decoder],
        topic: str,
    ) -> None:
        self._tables = tables
        self._topics = topics
        self._consumer = consumer
        self._decoders = decoders
        self._topic = topic
        tables.execute(sql.CREATE_TOLD)

    def _loaded(self, topic: str) -> dict[Partition, Span]:
        """From where to where the topic is loaded, as far as it still reaches.

        Raises:
            KafkaTroubleError: it isn't the topic that was loaded from.
        """
        described = self._topics.look(topic)
        spans = {
            Partition(topic, number): Span(span.first, span.first)
            for number, span in described.spans.items()
        }
        for name, number, next_offset, topic_id in self._tables.execute(loading.READ_ALL_OFFSETS):
            if name == topic:
                fault = described.fault(number, StoredOffset(next_offset, topic_id))
                if fault:
                    raise KafkaTroubleError(f"{topic} partition {number}: {fault}")
                spans[Partition(topic, number)] = Span(described.spans[number].first, next_offset)
        return spans

    def not_loaded(self, topic: str, keys: set[str]) -> set[str]:
        """Return the ids of the records with these keys that lie behind what is loaded."""
        found = set()
        for slices in self._behind(topic):
            for message, event in decode(slices, self._decoders).rows:
                if (message.key() or b"").decode() in keys:
                    found.add(_id(event))
        return found

    def _behind(self, topic: str) -> Iterator[list[Slice]]:
        """Read what lies behind what is loaded, committed or not.

        A relay's commit is answered before the partitions know of it: for that moment an event is
        published, and no reader of what is committed sees it.
        """
        # The offsets first: what is loaded since is found in the tables, which are asked later.
        loaded = self._loaded(topic)
        ends = self._topics.look(topic, IsolationLevel.READ_UNCOMMITTED).spans
        rest = {place: Span(span.end, ends[place.partition].end) for place, span in loaded.items()}
        yield from records.read({**self._consumer, "isolation.level": "read_uncommitted"}, rest)

    # ---- records and facts

    def compare(self, report: "Report") -> None:
        """Compare all records that are loaded."""
        spans = self._loaded(self._topic)
        width = max(NARROWEST_BUCKET, -(-sum(span.end for span in spans.values()) // BUCKETS))
        origins: Counter[tuple[int, int]] = Counter()
        for slices in records.read(self._consumer, spans):
            decoded = decode(slices, self._decoders)
            self._compare_bad(decoded.bad, report)
            with self._tables.transaction():
                report.count("repeated records", len(decoded.rows) - self._stage(decoded.rows))
                self._compare_told(report)
                for partition, bucket, count in self._tables.execute(sql.ORIGINS, {"width": width}):
                    origins[partition, bucket] += count
            report.count("records", len(decoded.rows) + len(decoded.bad))
        self._compare_origins(spans, width, origins, report)

    def _stage(self, rows: Iterable[Row]) -> int:
        """Put what records say beside the facts; return how many events they are."""
        self._tables.execute(sql.PLAN_FOR_BATCH)
        facts = star.rows_of(rows).facts
        with self._tables.cursor() as cursor, cursor.copy(COPY_TOLD) as copy:
            copy.write("".join(facts.values()))
        return len(facts)

    def _compare_told(self, report: "Report") -> None:
        missing: dict[Partition, dict[int, Difference]] = {}
        for key, partition, offset, told in self._missing(report):
            missing.setdefault(Partition(self._topic, partition), {})[offset] = Difference(
                "missing", "fct_reservation_events", key, told
            )
        for place, there in missing.items():
            # Postgres refused it: an honest dead letter.
            refused = self._letters_at(place, there)
            for offset in there.keys() - refused:
                report.add(there[offset])

    def _missing(self, report: "Report") -> list[tuple[str, int, int, Any]]:
        """Name facts that aren't as what is staged tells; return what has none, with its place."""
        missing = []
        for *told_at, told, stored in self._tables.execute(sql.TOLD_AND_STORED):
            if stored is None:
                missing.append((*told_at, told))
                continue
            for column, value in told.items():
                if column not in PLACE and stored[column] != value:
                    where = f"fct_reservation_events.{column}"
                    report.add(Difference("altered", where, told_at[0], value, stored[column]))
        return missing

    def _letters_at(self, place: Partition, offsets: Iterable[int]) -> set[int]:
        rows = self._tables.execute(
            sql.LETTERS_AT,
            {"topic": place.topic, "partition": place.partition, "offsets": list(offsets)},
        )
        return {int(row[0]) for row in rows}

    def _compare_bad(self, bad: Sequence[BadRecord], report: "Report") -> None:
        """A bad record is to be found among the dead letters."""
        at: dict[Partition, dict[int, BadRecord]] = {}
        for record in bad:
            at.setdefault(partition_of(record.message), {})[int(record.message.offset() or 0)] = (
                record
            )
        for place, there in at.items():
            kept = self._letters_at(place, there)
            report.count("dead letters", len(kept))
            for offset in sorted(there.keys() - kept):
                key = f"{place.topic} {place.partition} {offset}"
                report.add(Difference("missing", "dead_letters", key, there[offset].error))

    # ---- facts and records

    def _compare_origins(
        self,
        spans: Mapping[Partition, Span],
        width: int,
        origins: Mapping[tuple[int, int], int],
        report: "Report",
    ) -> None:
        """Each fact names the record that brought it: as many facts as such records."""
        for key, partition, offset in self._tables.execute(
            sql.STRAY_FACTS, {"topic": self._topic}
        ).fetchall():
            found = f"partition {partition} offset {offset}"
            report.add(Difference("extra", "fct_reservation_events", key, found=found))
        facts = {
            (partition, bucket): count
            for partition, bucket, count in self._tables.execute(
                sql.FACTS_BY_PLACE,
                {
                    "width": width,
                    "partitions": [place.partition for place in spans],
                    "firsts": [span.first for span in spans.values()],
                    "ends": [span.end for span in spans.values()],
                },
            )
        }
        report.count("facts", sum(facts.values()))
        unlike = sorted(place for place, count in facts.items() if origins.get(place, 0) != count)
        for at in unlike[:BUCKETS_LOOKED_INTO]:
            self._look_into(at, width, spans, report)
        if len(unlike) > BUCKETS_LOOKED_INTO:
            rest = len(unlike) - BUCKETS_LOOKED_INTO
            found = f"facts without a record in {rest} more ranges of {width} offsets"
            report.add(Difference("extra", "fct_reservation_events", "", found=found))

    def _look_into(
        self,
        bucket: tuple[int, int],
        width: int,
        spans: Mapping[Partition, Span],
        report: "Report",
    ) -> None:
        """Read a few records again, for the facts of which there is none."""
        place = Partition(self._topic, bucket[0])
        whole = spans[place]
        first = max(whole.first, bucket[1] * width)
        span = Span(first, min(whole.end, (bucket[1] + 1) * width))
        told = {
            (_id(event), int(message.offset() or 0))
            for slices in records.read(self._consumer, {place: span})
            for message, event in decode(slices, self._decoders).rows
        }
        rows = self._tables.execute(
            sql.FACTS_OF_PLACES, {"width": width, "partitions": [bucket[0]], "buckets": [bucket[1]]}
        )
        for key, partition, offset in rows.fetchall():
            if span.first <= offset < span.end and (key, offset) not in told:
                found = f"partition {partition} offset {offset}"
                report.add(Difference("extra", "fct_reservation_events", key, found=found))

    # ---- the outbox

    def compare_published(self, outbox: Outbox, topic: str, report: "Report") -> None:
        """Compare what the outbox has published, and still has, with facts and dead letters."""
        for row_id, key, error in outbox.quarantined(topic):
            report.add(Difference("missing", "topic", f"outbox {row_id}", key, error or "waits"))
        events: set[str] = set()
        letters: dict[bytes, Difference] = {}
        for rows in outbox.published(topic):
            decoded = decode([_as_slice(topic, rows)], self._decoders)
            with self._tables.transaction():
                self._stage(decoded.rows)
                events |= {key for key, *_ in self._missing(report)}
            for record in decoded.bad:
                where = f"outbox {record.message.offset()}"
                letter = Difference("missing", "dead_letters", where, record.error)
                letters[_digest(record.message)] = letter
            report.count("outbox rows", len(rows))
            if len(events) + len(letters) >= LOOKED_FOR_AT_ONCE:
                self._name_lost(topic, events, letters, report)
                events, letters = set(), {}
        self._name_lost(topic, events, letters, report)

    def _name_lost(
        self, topic: str, events: set[str], letters: dict[bytes, Difference], report: "Report"
    ) -> None:
        """Name what is neither in the topic behind what is loaded nor, asked after it, loaded."""
        if not events and not letters:
            return
        lost = set(events)
        for slices in self._behind(topic):
            decoded = decode(slices, self._decoders)
            lost -= {_id(event) for _, event in decoded.rows}
            for record in decoded.bad:
                letters.pop(_digest(record.message), None)
        names = [key.rpartition(":") for key in lost]
        wanted = {
            "reservation_ids": [name for name, _, _ in names],
            "versions": [int(version) for _, _, version in names],
        }
        lost -= {str(row[0]) for row in self._tables.execute(loading.KNOWN_EVENTS, wanted)}
        for key in sorted(lost):
            report.add(Difference("missing", "fct_reservation_events", key))
        wanted = {"topic": topic, "digests": list(letters)}
        for row in self._tables.execute(sql.LETTERS_LIKE, wanted):
            letters.pop(bytes(row[0]), None)
        for letter in letters.values():
            report.add(letter)


def _as_slice(topic: str, rows: Iterable[tuple[int, str, str]]) -> Slice:
    """Outbox rows as if they were read from the topic, with their ids as offsets."""
    return Slice(
        topic,
        -1,
        "",
        0,
        0,
        [
            Message(
                topic=topic, partition=-1, offset=row_id, key=key.encode(), value=payload.encode()
            )
            for row_id, key, payload in rows
        ],
    )


def _digest(message: Message) -> bytes:
    """As `sql.LETTERS_LIKE` makes it of a dead letter."""
    return sha256((message.key() or b"") + b"\0" + (message.value() or b"")).digest()


def _id(event: Any) -> str:
    if isinstance(event, ConcertEvent):
        return f"{event.concert.concert_id}:{event.concert.version}"
    return str(event.id)
