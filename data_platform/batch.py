"""A batch on its way from Kafka to Postgres: slices of partitions → rows and bad records."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import NamedTuple, cast

from confluent_kafka import Message

from data_platform.events import BadRecordError, Decoder, Event

ERROR_TEXT_LENGTH_CHARACTERS = 1000


@dataclass
class Slice:
    """What a batch has of one partition.

    Attributes:
        first_offset: where Postgres stands if nobody else moved it.
        next_offset: where Postgres will stand once the batch is loaded; it may lie behind the
            last record, because transaction markers take offsets too.
    """

    topic: str
    partition: int
    topic_id: str
    first_offset: int
    next_offset: int
    messages: list[Message] = field(default_factory=list)


class Row(NamedTuple):
    """A good record and what it says."""

    message: Message
    event: Event


class BadRecord(NamedTuple):
    """A record that goes to the dead letters, and why; made by `bad_record`.

    Attributes:
        headers: in order, as [[name, value in base64 or null], ...].
    """

    message: Message
    reason: str
    error: str
    headers: list[list[str | None]]


Place = tuple[str, int]


@dataclass(frozen=True)
class Decoded:
    """A batch as it will be loaded: each record of `slices` is in `rows` or in `bad`.

    Attributes:
        last_event_at: when the newest good event of each (topic, partition) happened.
    """

    slices: Sequence[Slice]
    rows: Sequence[Row]
    bad: Sequence[BadRecord]
    last_event_at: Mapping[Place, datetime]

    def pieces(self, records: int) -> Iterator["Decoded"]:
        """Split into batches of at most so many records of one partition, in order."""
        for part in self.slices:
            first_offset = part.first_offset
            for at in range(0, max(1, len(part.messages)), records):
                messages = part.messages[at : at + records]
                end = part.next_offset
                if at + records < len(part.messages):
                    end = int(messages[-1].offset() or 0) + 1
                piece = replace(part, first_offset=first_offset, next_offset=end, messages=messages)
                known = {id(message) for message in messages}
                rows = [row for row in self.rows if id(row.message) in known]
                yield Decoded(
                    [piece],
                    rows,
                    [record for record in self.bad if id(record.message) in known],
                    _newest(piece, rows),
                )
                first_offset = end


def decode(slices: Sequence[Slice], decoders: Mapping[str, Decoder]) -> Decoded:
    """Decode each record with its topic's decoder."""
    rows: list[Row] = []
    bad: list[BadRecord] = []
    last_event_at: dict[Place, datetime] = {}
    for part in slices:
        decoder, first = decoders[part.topic], len(rows)
        for message in part.messages:
            try:
                rows.append(Row(message, decoder(message.key(), message.value())))
            except BadRecordError as error:
                bad.append(bad_record(message, error.reason, error))
        last_event_at |= _newest(part, rows[first:])
    return Decoded(slices, rows, bad, last_event_at)


def _newest(part: Slice, rows: Sequence[Row]) -> dict[Place, datetime]:
    place = part.topic, part.partition
    return {place: max([event.occurred_at for _, event in rows])} if rows else {}


def bad_record(message: Message, reason: str, error: BaseException) -> BadRecord:
    """Make a bad record of a message; to be called once for each."""
    # A name that isn't UTF-8 makes the first call raise a SystemError. A second call on the same
    # message would return what was half made, and crash the process.
    try:
        headers = _as_json(message)
    except (SystemError, UnicodeDecodeError) as unreadable:
        note = f"headers unreadable: {unreadable.__cause__ or unreadable}; {error}"
        return BadRecord(message, reason, printable(note), [])
    return BadRecord(message, reason, printable(str(error)), headers)


def _as_json(message: Message) -> list[list[str | None]]:
    headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
    return [
        [printable(name), None if value is None else base64.b64encode(value).decode()]
        for name, value in headers
    ]


def printable(text: str) -> str:
    """Make `text` storable as Postgres text: no NUL, no lone surrogate, of bounded length."""
    storable = text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
    return storable[:ERROR_TEXT_LENGTH_CHARACTERS]
