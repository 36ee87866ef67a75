"""The relay's loop: read what is new, publish it, move the cursor.

At least once: a row's cursor moves only when Kafka has acknowledged the row and all before it, so
whatever is killed, the next term starts at or before the first unacknowledged row. Nothing is
remembered across connections, because a crashed Postgres may have taken back what memory knows.
"""

import time
from dataclasses import dataclass, field

import psycopg
import structlog
from confluent_kafka import KafkaError

from outbox_relay import leadership, reader
from outbox_relay.config import Settings
from outbox_relay.leadership import LostLeadershipError, Term
from outbox_relay.metrics import Metrics
from outbox_relay.publisher import Publisher, PublishError
from outbox_relay.reader import Chunk
from outbox_relay.stopping import Stop

STANDBY_INTERVAL_S = 0.5
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0

log = structlog.get_logger()


@dataclass(slots=True)
class Relay:
    """One relay process; `run` returns when `stop` is requested."""

    settings: Settings
    stop: Stop
    metrics: Metrics
    # Behind a refused record one row at a time, else each attempt would repeat all the others.
    _chunk_rows: int = field(init=False, default=1)

    def run(self) -> None:
        """Serve terms until stopped; outages are waited for, in this place alone.

        Raises:
            RefusedError: going on by itself could lose or double events.
        """
        outage = _Outage()
        self._chunk_rows = self.settings.outbox_relay_chunk_max_rows
        while not self.stop.requested:
            try:
                self._serve_term(outage)
            except (psycopg.Error, PublishError, LostLeadershipError) as error:
                self.metrics.failed(error)
                outage.tell(error)
                self.stop.wait(outage.backoff_s)
            finally:
                self.metrics.leader.set(0)

    def _serve_term(self, outage: "_Outage") -> None:
        """Lead until stopped or until something fails."""
        settings = self.settings
        with leadership.connect(settings.database_url) as connection:
            leadership.examine(connection)
            if not self._wait_for_leadership(connection, outage):
                return
            term = Term.begin(
                connection, settings.outbox_relay_name, settings.outbox_relay_delivery
            )
            self.metrics.leader.set(1)
            if not outage.ongoing:
                log.info("leading", position=term.position.published_snapshot)
            brokers = _BrokerReports()
            with Publisher(settings.kafka_properties(), brokers.report) as publisher:
                while not self.stop.requested:
                    chunk = self._read(connection, term)
                    outage.end_of(psycopg.Error, LostLeadershipError)
                    if chunk.position == term.position:
                        publisher.poll()
                        self.stop.wait(settings.outbox_relay_poll_interval_ms / 1000)
                        continue
                    self._publish(chunk, term, publisher)
                    outage.end_of(Exception)
                    brokers.recovered()
            log.info("stopped leading", position=term.position.published_snapshot)

    def _read(self, connection: psycopg.Connection, term: Term) -> Chunk:
        self.metrics.progressed()
        return reader.read(
            connection,
            term.position,
            max_rows=self._chunk_rows,
            max_bytes=self.settings.outbox_relay_chunk_max_bytes,
        )

    def _publish(self, chunk: Chunk, term: Term, publisher: Publisher) -> None:
        """Publish a chunk and move the cursor behind what Kafka has of it."""

        def keep_leading() -> None:
            term.hold()
            self.metrics.progressed()

        try:
            publisher.publish(chunk.rows, keep_leading)
        except PublishError as error:
            self._chunk_rows = 1
            if error.acknowledged_rows:
                position = chunk.position_after(error.acknowledged_rows)
                term.advance(position, rows=error.acknowledged_rows)
            raise
        term.advance(chunk.position, rows=len(chunk.rows))
        self._chunk_rows = min(2 * self._chunk_rows, self.settings.outbox_relay_chunk_max_rows)
        self.metrics.published(len(chunk.rows))

    def _wait_for_leadership(self, connection: psycopg.Connection, outage: "_Outage") -> bool:
        """Return True as the leader, False when stopped while standing by."""
        said = False
        while not leadership.try_lock(connection, self.settings.outbox_relay_name):
            outage.end_of(psycopg.Error, LostLeadershipError)
            if not said:
                log.info("standing by", reason="another relay of this name leads")
                said = True
            self.metrics.progressed()
            if self.stop.wait(STANDBY_INTERVAL_S):
                return False
        return True


class _Outage:
    """Says once that something fails, and once that it is over; the backoff is bounded."""

    def __init__(self) -> None:
        # The kind, not the error: its traceback would keep the last term's producer alive.
        self._kind: type[Exception] | None = None
        self._since = 0.0
        self.backoff_s = 0.0

    def tell(self, error: Exception) -> None:
        """Note a failure; it is logged when it is of another kind than the last one."""
        self.backoff_s = min(max(self.backoff_s * 2, BACKOFF_FIRST_S), BACKOFF_MAX_S)
        if self._kind is None:
            self._since = time.monotonic()
        if self._kind is not type(error):
            log.warning("waiting", reason=type(error).__name__, error=str(error).strip())
        self._kind = type(error)

    def end_of(self, *kinds: type[Exception]) -> None:
        """Note that what failed in one of these ways works again."""
        if self._kind is not None and issubclass(self._kind, kinds):
            log.info("recovered", after_s=round(time.monotonic() - self._since, 1))
            self._kind = None
            self.backoff_s = 0.0

    @property
    def ongoing(self) -> bool:
        """Whether something fails at present."""
        return self._kind is not None


class _BrokerReports:
    """Logs Kafka's outage once, and its end; the client repeats its reports for ever."""

    # One broker's lost connection is librdkafka's everyday business.
    EVERYDAY = frozenset({KafkaError._TRANSPORT, KafkaError._TIMED_OUT, KafkaError._RESOLVE})  # noqa: SLF001

    def __init__(self) -> None:
        self._said: set[str] = set()

    def report(self, error: KafkaError) -> None:
        """Take a report of the producer (its `error_cb`)."""
        if error.code() not in self.EVERYDAY and error.name() not in self._said:
            self._said.add(error.name())
            log.warning("kafka fails", reason=error.name(), error=error.str())

    def recovered(self) -> None:
        """Note that Kafka has acknowledged everything."""
        if self._said:
            log.info("kafka works again", reasons=sorted(self._said))
            self._said.clear()
