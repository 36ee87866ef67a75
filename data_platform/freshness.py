"""Up to which moment the tables are complete (`load_offsets.complete_up_to`).

Guarantees: what is written is true whoever writes it and whoever loads: each record that Kafka had
committed before that moment has been read into the tables or the dead letters. Kafka's end is
asked for after Postgres' clock was read, and counts once Postgres has reached it; so an idle
partition is as fresh as a busy one. A partition whose topic was made anew, or is shorter than what
was loaded from it, keeps its old moment.

Every worker does this, in a thread beside the load, for all partitions: what one has just
written, the others leave alone. Each tells its own metrics what it has seen; an outage leaves the
last values, so the age of the moment grows.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

import psycopg
import structlog
from confluent_kafka import KafkaException
from psycopg.rows import class_row, tuple_row

from data_platform import sql_freshness as sql
from data_platform.errors import KafkaTroubleError, told
from data_platform.health import Health
from data_platform.topics import Topic, Topics

APPLICATION_NAME = "data-platform freshness"
CONNECT_TIMEOUT_S = 5
ROUND_INTERVAL_S = 2.0
# Ends that Postgres hasn't reached yet; while there are so many, no further one is noted.
PENDING_ENDS = 300

log = structlog.get_logger()


class Place(NamedTuple):
    """A row of READ_PLACES: where Postgres stands, and its clock before Kafka is asked."""

    topic: str
    kafka_partition: int
    next_offset: int
    topic_id: str
    complete_up_to: datetime | None
    asked_at: datetime


class End(NamedTuple):
    """At `asked_at`, Postgres' time, Kafka's records ended before `offset`, or later."""

    asked_at: datetime
    offset: int


@dataclass
class Watermarks:
    """Works out the moments; one connection, made when needed.

    Args:
        url: libpq connection string of the loader's role.
        topics: asks Kafka about topics.
        names: the topics.
        health: is told.
    """

    url: str
    topics: Topics
    names: Sequence[str]
    health: Health | None = None
    _pending: dict[tuple[str, int, str], deque[End]] = field(default_factory=dict)
    _connection: psycopg.Connection[Place] | None = None

    def run(self, stopping: threading.Event) -> None:
        """Go round until `stopping`; an outage is said once, and waited out."""
        failing = False
        while not stopping.wait(ROUND_INTERVAL_S):
            try:
                self.round()
                failing = False
            except (psycopg.Error, KafkaException, KafkaTroubleError) as error:
                self.close()
                if not failing:
                    log.info("freshness_unknown", cause=told(error))
                failing = True
        self.close()

    def round(self) -> None:
        """Ask Postgres, then Kafka; write what is certain by now.

        Raises:
            psycopg.Error, KafkaException, KafkaTroubleError: one of them doesn't answer.
        """
        connection = self._connected()
        places = connection.execute(sql.READ_PLACES, {"topics": list(self.names)}).fetchall()
        for name in sorted({place.topic for place in places}):
            topic = self.topics.look(name)
            # Asked again: only then do the ends belong to the topic that was loaded from.
            if self.topics.topic_id(name) != topic.topic_id:
                continue
            of_topic = [place for place in places if place.topic == name]
            for place in of_topic:
                self._mark(connection, place, topic)
            self._tell(topic, of_topic)
        if self.health is not None:
            with connection.cursor(row_factory=tuple_row) as cursor:
                found = cursor.execute(sql.COUNT_DEAD_LETTERS).fetchone()
            self.health.dead_letters_kept.set(found[0] if found else 0)

    def _tell(self, topic: Topic, places: Sequence[Place]) -> None:
        """Tell the metrics of a topic: its oldest moment, and what is not loaded of it."""
        if self.health is None:
            return
        name = places[0].topic
        numbers = [place.kafka_partition for place in places]
        ends = [topic.spans[p].end if p in topic.spans else 0 for p in numbers]
        behind = [max(0, end - place.next_offset) for end, place in zip(ends, places, strict=True)]
        self.health.lag_records.labels(name).set(sum(behind))
        moments = [place.complete_up_to for place in places]
        known = [moment for moment in moments if moment is not None]
        if len(known) == len(moments):
            oldest_s = min(known).timestamp()
            self.health.complete_up_to.labels(name).set(oldest_s)

    def _mark(self, connection: psycopg.Connection[Place], place: Place, topic: Topic) -> None:
        span = topic.spans.get(place.kafka_partition)
        if place.topic_id != topic.topic_id or span is None or span.end < place.next_offset:
            return
        pending = self._pending.setdefault((*place[:2], place.topic_id), deque())
        if len(pending) < PENDING_ENDS:
            pending.append(End(place.asked_at, span.end))
        reached = None
        while pending and pending[0].offset <= place.next_offset:
            reached = pending.popleft()
        if reached and _is_news(reached.asked_at, place.complete_up_to):
            parameters: Mapping[str, object] = place._asdict() | {
                "complete_up_to": reached.asked_at,
                "end": reached.offset,
            }
            # Each partition by itself: whoever holds one row keeps nobody from the others.
            connection.execute(sql.MARK_COMPLETE, parameters)

    def _connected(self) -> psycopg.Connection[Place]:
        if self._connection is None:
            self._connection = psycopg.connect(
                self.url,
                autocommit=True,
                application_name=APPLICATION_NAME,
                connect_timeout=CONNECT_TIMEOUT_S,
                row_factory=class_row(Place),
            )
            self._connection.execute(sql.SESSION)
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _is_news(moment: datetime, known: datetime | None) -> bool:
    return known is None or moment - known > timedelta(seconds=ROUND_INTERVAL_S / 2)
