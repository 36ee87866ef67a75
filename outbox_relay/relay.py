"""The relay's main thread: lead, or stand by; while leading, keep a lane for each topic.

The leadership is a lock on this thread's own connection, which is used all the time: it asks for
news on behalf of the lanes that sleep. A process that is stopped or cut off loses the connection,
and with it the lock, within seconds; what it then still tries is refused by Kafka's fencing or by
the cursor's compare-and-swap.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psycopg
import structlog

from outbox_relay import __version__, leadership, sql
from outbox_relay.config import Settings
from outbox_relay.cursor import LostLeadershipError
from outbox_relay.housekeeping import Housekeeping
from outbox_relay.lane import FINISH_WITHIN_S, Lane
from outbox_relay.leadership import RefusedError, Term
from outbox_relay.metrics import Metrics
from outbox_relay.news import News
from outbox_relay.notify import Notifier
from outbox_relay.outages import Outage
from outbox_relay.reach import Reach
from outbox_relay.replicas import Replicas
from outbox_relay.stopping import Stop

if TYPE_CHECKING:
    from outbox_relay.tracing import Traces

STANDBY_INTERVAL_S = 0.5
# Lanes are looked after so often.
ROUND_INTERVAL_S = 1.0
# Who can't reach Kafka for so long lets another relay try, which may be better connected.
KAFKA_AWAY_S = 5.0
# Who is in trouble for so long asks whether it is Kafka's or a topic's.
ASK_KAFKA_AFTER_S = 1.0
# Longer than a standby's interval: the one that gave up shall not be the next.
STEP_DOWN_S = 2.0
# Then their sessions with Postgres are cut, which ends those that hang there.
LANES_END_WITHIN_S = 10.0
LANES_BREAK_OFF_WITHIN_S = 2.0

log = structlog.get_logger()


class KafkaAwayError(Exception):
    """This process can't reach Kafka."""


class HangingError(Exception):
    """A part of this process waits for something that doesn't come."""


class StuckError(Exception):
    """A lane doesn't end, whatever is done: nothing but the process' end can help."""


def works(lanes: dict[str, Lane]) -> bool:
    """Whether every lane has come to work or waits for its topic, and not all wait."""
    return any(lane.works for lane in lanes.values()) and all(
        lane.works or lane.outage.ongoing or lane.failure for lane in lanes.values()
    )


@dataclass(slots=True)
class Relay:
    """One relay process; `run` returns when `stop` is requested."""

    settings: Settings
    stop: Stop
    metrics: Metrics
    notifier: Notifier
    traces: "Traces | None" = None
    _outages: dict[str, Outage] = field(init=False, default_factory=dict)
    _refused: set[str] = field(init=False, default_factory=set)
    _said_leading: bool = field(init=False, default=False)
    # Only while somebody wants to know.
    _reach: Reach | None = field(init=False, default=None)

    def run(self) -> None:
        """Serve terms until stopped; what ends a term is waited for here.

        Raises:
            RefusedError: going on by itself could lose or double events.
            StuckError: a part of this process hangs for good.
        """
        log.info("started", version=__version__, delivery=self.settings.outbox_relay_delivery)
        outage = Outage()
        # Before Postgres has answered: an outage is waited for here, not by those behind us.
        self.notifier.ready()
        while not self.stop.requested:
            try:
                self._serve_term(outage)
            except (psycopg.Error, LostLeadershipError, HangingError) as error:
                self._failed(error, outage)
                self.stop.wait(outage.backoff_s)
            except KafkaAwayError as error:
                self._failed(error, outage)
                self.stop.wait(max(STEP_DOWN_S, outage.backoff_s))

    def _progressed(self, state: str) -> None:
        """Note that this thread has come round; systemd hears of it when every lane has, too."""
        self.metrics.progressed("main")
        self.notifier.status(state)
        if self.metrics.healthy():
            self.notifier.progressed()

    def _failed(self, error: Exception, outage: Outage) -> None:
        self.metrics.retried(type(error).__name__, "")
        outage.tell(error)
        self.metrics.progressed("main")  # waiting for Postgres is what we are to do then
        self.notifier.status(f"waiting: {error}")
        self.notifier.progressed()

    def _serve_term(self, outage: Outage) -> None:
        """Lead until stopped or until something fails."""
        name = self.settings.outbox_relay_name
        with (
            leadership.connect(self.settings.database_url, "standby") as connection,
            ExitStack() as ends_with_it,
        ):
            ends_with_it.callback(self._ask_no_more)
            with leadership.answering(connection):
                leadership.examine(connection)
            if not self._wait_for_leadership(connection, outage):
                return
            with leadership.answering(connection):
                term = leadership.begin_term(connection, name)
            self.metrics.leading(True)
            housekeeping = Housekeeping(self.settings, self.metrics)
            housekeeping.start()
            replicas = Replicas(self.settings, self.metrics)
            replicas.start()
            try:
                with self._lanes() as lanes:
                    self._lead(connection, term, lanes, outage)
            finally:
                housekeeping.stop()
                replicas.stop()
                self.metrics.leading(False)
                if self._said_leading:
                    log.info("stopped leading", term=term.epoch)
                self._said_leading = False

    def _lead(
        self,
        connection: psycopg.Connection,
        term: Term,
        lanes: dict[str, Lane],
        outage: Outage,
    ) -> None:
        news = News(connection)
        next_round_s = 0.0
        while not self.stop.requested:
            if time.monotonic() >= next_round_s:
                with leadership.answering(connection):
                    self._open_lanes(connection, term, lanes)
                    self._refuse_to_hold_up(connection, lanes)
                if works(lanes):
                    outage.end_of(Exception)
                    if not self._said_leading:
                        log.info("leading", term=term.epoch)
                        self._said_leading = True
                self._progressed("leading")
                if not self.metrics.healthy():
                    raise HangingError("a lane doesn't come round: a session with Postgres hangs")
                next_round_s = time.monotonic() + ROUND_INTERVAL_S
            self._raise_failure(lanes)
            for topic in news.of([name for name, lane in lanes.items() if lane.asleep]):
                lanes[topic].news.set()
            # Not an event's wait(), which costs half as much again: this is all that idleness does.
            # A stop is seen a poll interval later.
            time.sleep(self.settings.outbox_relay_poll_interval_ms / 1000)

    @contextmanager
    def _lanes(self) -> Iterator[dict[str, Lane]]:
        """Give a place for lanes; whatever happens, they have ended behind it."""
        lanes: dict[str, Lane] = {}
        # What is in flight must not wait for a lost connection.
        finish_within_s, end_within_s = 0.0, LANES_BREAK_OFF_WITHIN_S
        try:
            yield lanes
            finish_within_s, end_within_s = FINISH_WITHIN_S, LANES_END_WITHIN_S
        finally:
            for lane in lanes.values():
                lane.stop(finish_within_s)
            _wait_for_the_end_of(lanes, end_within_s)
        self._raise_failure(lanes)

    def _raise_failure(self, lanes: dict[str, Lane]) -> None:
        """End the term for what ended a lane; one that refuses holds up no other.

        Raises:
            RefusedError: every lane refuses.
        """
        failed = [lane for lane in lanes.values() if lane.failure is not None]
        for lane in failed:
            assert lane.failure is not None  # noqa: S101 - chosen by it
            if not isinstance(lane.failure, RefusedError) or len(failed) == len(lanes):
                raise lane.failure
            if lane.topic not in self._refused:
                log.error("refused", topic=lane.topic, error=str(lane.failure))
                self.metrics.retried("RefusedError", lane.topic)
                self._refused.add(lane.topic)

    def _open_lanes(
        self, connection: psycopg.Connection, term: Term, lanes: dict[str, Lane]
    ) -> None:
        """Start lanes for topics that have none yet: an outbox may get more of them."""
        asked_at_s = time.monotonic()
        for (topic,) in connection.execute(sql.TOPICS, {"name": term.name}):
            if topic not in lanes:
                outage = self._outages.setdefault(topic, Outage(topic=topic))
                lanes[topic] = Lane(
                    self.settings, term, topic, self.metrics, outage, traces=self.traces
                )
                lanes[topic].start()
            lanes[topic].confirm(asked_at_s)

    def _ask_kafka(self) -> Reach:
        """Return what is known of Kafka; it is asked again and again from now on."""
        self._reach = self._reach or Reach(self.settings.kafka_properties())
        return self._reach

    def _ask_no_more(self) -> None:
        if self._reach is not None:
            self._reach.stop()
            self._reach = None

    def _refuse_to_hold_up(self, connection: psycopg.Connection, lanes: dict[str, Lane]) -> None:
        """Give up leading when it is we who can't reach Kafka, and another relay can.

        Raises:
            KafkaAwayError: no broker has answered us.
        """
        away_s = max((lane.kafka_away_s for lane in lanes.values()), default=0.0)
        if away_s < ASK_KAFKA_AFTER_S:
            self._ask_no_more()
            return
        reach = self._ask_kafka()
        if (
            away_s >= KAFKA_AWAY_S
            and reach.error is not None
            and leadership.has_fit_standby(connection, self.settings.outbox_relay_name)
        ):
            raise KafkaAwayError(f"no broker has answered: {reach.error}")

    def _wait_for_leadership(self, connection: psycopg.Connection, outage: Outage) -> bool:
        """Return True as the leader, False when stopped while standing by."""
        name = self.settings.outbox_relay_name
        standby = leadership.Standby(connection, name)
        of_kafka = Outage(work="standing by")
        said = False
        while True:
            with leadership.answering(connection):
                if leadership.try_lock(connection, name):
                    standby.tell(fit=False)
                    break
                reach = self._ask_kafka()
                standby.tell(fit=reach.answers)
            if reach.error is not None:
                of_kafka.tell(KafkaAwayError(f"no broker has answered: {reach.error}"))
            elif reach.answers:
                of_kafka.end_of(KafkaAwayError)
            outage.end_of(psycopg.Error, LostLeadershipError, HangingError)
            self._outages.clear()  # another's now
            if not said:
                log.info("standing by", reason="another relay of this name leads")
                said = True
            self.metrics.standing_by(True)
            self._progressed("standing by")
            if self.stop.wait(STANDBY_INTERVAL_S):
                return False
        self.metrics.standing_by(False)
        return True


def _wait_for_the_end_of(lanes: dict[str, Lane], within_s: float) -> None:
    """Wait until all have ended; those that have not `within_s` seconds are cut from Postgres.

    Raises:
        StuckError: one of them doesn't.
    """
    _join(lanes, within_s)
    for lane in lanes.values():
        if lane.is_alive():
            lane.cut_off()
    _join(lanes, LANES_END_WITHIN_S)
    if left := sorted(lane.topic for lane in lanes.values() if lane.is_alive()):
        raise StuckError(f"the lanes of these topics do not end: {', '.join(left)}")


def _join(lanes: dict[str, Lane], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    for lane in lanes.values():
        lane.join(max(0.0, deadline_s - time.monotonic()))
