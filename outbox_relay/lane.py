"""A lane publishes one topic: read what is new, send it, move the cursor.

Each topic has a lane, so one that can't be written holds up only itself. A lane remembers nothing
across its connections, because a crashed Postgres may have taken back what memory knows. Kafka's
outages are waited for here, in this place alone; what Postgres says ends the whole term.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
import structlog
from confluent_kafka import KafkaException

from outbox_relay import leadership, reader, sql
from outbox_relay.at_least_once import AtLeastOnce
from outbox_relay.config import Settings
from outbox_relay.exactly_once import TRANSACTION_MAX_CHUNKS, ExactlyOnce
from outbox_relay.leadership import Term
from outbox_relay.metrics import Metrics
from outbox_relay.outages import BrokerReports, Outage
from outbox_relay.pace import Pace
from outbox_relay.producer import Channel, PublishError, RecordRefusedError, StoppedError
from outbox_relay.quarantine import Quarantine
from outbox_relay.reader import Chunk, Position

if TYPE_CHECKING:
    from outbox_relay.tracing import Spans, Traces

# After news a lane asks again at once, for more may follow; then it waits to be told.
HOT_S = 0.1
HOT_PAUSE_S = 0.001
# How often a lane looks for what else there may be to do than news.
EXTRA_INTERVAL_S = 1.0
FINISH_WITHIN_S = 4.0
# So long after a sign of life of the leader's session nobody else can lead: a little less than its
# idle_session_timeout. A process that was frozen must not send what its successor has sent.
LEASE_S = 4.0
LEASE_POLL_S = 0.01
# At a time: the others shall not wait long for those that were released.
RELEASE_MAX_S = 0.5

Delivery = AtLeastOnce | ExactlyOnce

log = structlog.get_logger()


class Lane(threading.Thread):
    """Publishes `topic` for one term; `failure` is what ended it."""

    def __init__(
        self,
        settings: Settings,
        term: Term,
        topic: str,
        metrics: Metrics,
        outage: Outage,
        *,
        traces: "Traces | None" = None,
    ) -> None:
        super().__init__(name=f"lane {topic}", daemon=True)
        self.topic = topic
        self.outage = outage
        self.news = threading.Event()
        self.asleep = False
        # Whether it has come to read: both Postgres and Kafka have let it.
        self.works = False
        self.failure: Exception | None = None
        self._settings = settings
        self._term = term
        self._metrics = metrics
        self._brokers = BrokerReports(lambda reason: metrics.retried(reason, topic))
        self._stopping = threading.Event()
        self._stop_by_s = 0.0
        self._leads_until_s = time.monotonic() + LEASE_S
        # Behind a refused record few rows at a time, until it is found; then more again.
        self._chunk_rows = settings.outbox_relay_chunk_max_rows
        # So many chunks are waited for one by one, however many rows they may have.
        self._alone_chunks = 0
        self._last_news_s = self._last_extra_s = time.monotonic()
        self._waits_since_s: float | None = None
        self._pace = Pace()
        self._traces = traces
        self._spans: Spans | None = None
        self._connection: psycopg.Connection | None = None

    @property
    def kafka_away_s(self) -> float:
        """How long Kafka has not done what this lane asked for."""
        since_s = self._waits_since_s
        waits_s = 0.0 if since_s is None else time.monotonic() - since_s
        return max(self.outage.lasted_s, waits_s)

    def confirm(self, at_s: float) -> None:
        """Be told that the leader's session lived at this (monotonic) time."""
        self._leads_until_s = at_s + LEASE_S

    def stop(self, within_s: float) -> None:
        """Ask it to end; what is in flight may take `within_s` seconds."""
        self._stop_by_s = time.monotonic() + within_s
        self._stopping.set()
        self.news.set()

    def cut_off(self) -> None:
        """Cut its session with Postgres, which it may hang in."""
        if self._connection is not None:
            leadership.cut(self._connection)

    def run(self) -> None:
        """Publish until stopped, or until something fails that ends the term."""
        structlog.contextvars.bind_contextvars(relay=self._settings.outbox_relay_name)
        try:
            while not self._stopping.is_set():
                self._hold_out()
        except StoppedError:
            log.warning("stopped with work in flight; it will be read again", topic=self.topic)
        except Exception as error:  # noqa: BLE001 - raised again by the relay, in the main thread
            self.failure = error
        finally:
            self.asleep = False
            self._metrics.forget(self.topic)

    def _hold_out(self) -> None:
        """Serve a session; when Kafka fails, say so once and wait."""
        try:
            self._serve()
        except (PublishError, KafkaException) as error:
            self.outage.tell(error)
            # A transaction that outlasts its timeout, chunk after chunk, must get smaller.
            self._chunk_rows = max(1, self._chunk_rows // 2)
            self._alone_chunks = TRANSACTION_MAX_CHUNKS
            self._metrics.retried(type(error).__name__, self.topic)
            self._stopping.wait(self.outage.backoff_s)
        except RecordRefusedError as error:
            # Sent again one by one, until the one that is refused alone is known.
            self._chunk_rows, self._alone_chunks = 1, TRANSACTION_MAX_CHUNKS
            self._metrics.retried(type(error).__name__, self.topic)

    def _serve(self) -> None:
        """Publish with one connection to Postgres and one session with Kafka."""
        self._progress()
        with leadership.connect(self._settings.database_url, self.name) as connection:
            self._connection = connection
            connection.execute(sql.BE_PATIENT)
            connection.execute(sql.LIMIT_READS)
            max_bytes = self._settings.outbox_relay_chunk_max_bytes
            with (
                reader.Reader(connection, self.topic, max_bytes) as rows,
                self._session(connection) as (delivery, quarantine),
            ):
                position = delivery.cursor.position
                while not self._stopping.is_set():
                    if time.monotonic() - self._last_extra_s >= EXTRA_INTERVAL_S:
                        position = self._extra(connection, delivery, quarantine, position)
                    position = self._step(rows, delivery, quarantine, position)
                delivery.finish()

    @contextmanager
    def _session(self, connection: psycopg.Connection) -> Iterator[tuple[Delivery, Quarantine]]:
        settings = self._settings
        make = ExactlyOnce if settings.outbox_relay_delivery == "exactly_once" else AtLeastOnce
        self._spans = self._traces.of(self.topic) if self._traces is not None else None
        channel = Channel(
            topic=self.topic,
            settings=settings,
            term=self._term,
            connection=connection,
            go_on=self._go_on,
            published=self._published,
            on_broker_error=self._brokers.report,
        )
        with make(channel) as delivery:
            quarantine = Quarantine(connection, settings.outbox_relay_name, self.topic)
            try:
                yield delivery, quarantine
            except RecordRefusedError as error:
                if error.row is None:
                    raise
                quarantine.take(error.row, str(error))
                row_id, key, *_ = error.row
                log.warning("quarantined", topic=self.topic, id=row_id, key=key, error=str(error))

    def _step(
        self, rows: reader.Reader, delivery: Delivery, quarantine: Quarantine, position: Position
    ) -> Position:
        """Publish the next chunk, or wait a little when there is none; return the new position."""
        self._progress()
        self.news.clear()
        # Before reading: a row that is committed after the read will be told to whoever sleeps.
        self.asleep = time.monotonic() - self._last_news_s > HOT_S
        chunk = rows.next(position, self._chunk_rows)
        self.works = True
        if chunk.position != position:
            self._last_news_s, self.asleep = time.monotonic(), False
            self._wait_for_the_lease()
            self._send(delivery, quarantine.divert(chunk))
            if not chunk.more:
                # Not an event's wait(), which costs half as much again. A stop is seen afterwards.
                time.sleep(self._pace.rest_s(len(chunk.rows)))
            return chunk.position
        delivery.settle()
        self._waits_since_s = None
        self.outage.end_of(Exception)
        self._pause(delivery)
        return position

    def _wait_for_the_lease(self) -> None:
        """Wait until the leader is known to lead; it is the leader who gives up."""
        while time.monotonic() > self._leads_until_s:
            self._go_on()
            time.sleep(LEASE_POLL_S)

    def _send(self, delivery: Delivery, chunk: Chunk) -> None:
        if chunk.rows:
            if self._spans is not None:
                self._spans.sent(chunk.rows)
            delivery.send(chunk)
        else:
            delivery.move(chunk.position)
        if self._alone_chunks or self._chunk_rows < self._settings.outbox_relay_chunk_max_rows:
            delivery.finish()
            self._alone_chunks = max(0, self._alone_chunks - 1)
            self._grow()
        elif not chunk.more:
            # In the middle of a backlog the next chunk is read while Kafka takes this one.
            delivery.settle()

    def _grow(self) -> None:
        """Take more rows at a time again, up to what is set."""
        most = self._settings.outbox_relay_chunk_max_rows
        self._chunk_rows = min(2 * self._chunk_rows, most)

    def _extra(
        self,
        connection: psycopg.Connection,
        delivery: Delivery,
        quarantine: Quarantine,
        position: Position,
    ) -> Position:
        """Do what a topic without news still needs: released events, a cursor that keeps up."""
        self._last_extra_s = time.monotonic()
        if quarantine:
            self._release(delivery, quarantine)
        passed = reader.skip_other_topics(connection, position, self.topic)
        if passed != position:
            delivery.move(passed)
        return passed

    def _release(self, delivery: Delivery, quarantine: Quarantine) -> None:
        """Publish what was released, for a while."""
        until_s, released = time.monotonic() + RELEASE_MAX_S, 0
        while time.monotonic() < until_s and (ready := quarantine.ready(self._chunk_rows)):
            self._wait_for_the_lease()
            if self._spans is not None:
                self._spans.sent(ready)
            delivery.publish_released(ready)
            quarantine.published(ready)
            released += len(ready)
            self._grow()
        if released:
            log.info("released", topic=self.topic, events=released)

    def _pause(self, delivery: Delivery) -> None:
        if delivery.wait(HOT_PAUSE_S):
            return
        self.news.wait(delivery.idle_for_s if self.asleep else HOT_PAUSE_S)

    def _published(self, rows: int, oldest_age_s: float) -> None:
        self._waits_since_s = None
        self.outage.end_of(Exception)
        self._brokers.recovered()
        self._metrics.published(self.topic, rows, oldest_age_s)
        if self._spans is not None:
            self._spans.published(rows)

    def _progress(self) -> None:
        self._metrics.progressed(self.topic)

    def _go_on(self) -> None:
        """Be called in every wait for Kafka: it is progress, until we are to stop."""
        self._progress()
        self._waits_since_s = self._waits_since_s or time.monotonic()
        if self._stopping.is_set() and time.monotonic() > self._stop_by_s:
            raise StoppedError
