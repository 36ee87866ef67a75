"""What fails is said once, and once that it works again; the backoff in between is bounded."""

import time
from collections.abc import Callable
from typing import Any

import psycopg
import structlog
from confluent_kafka import KafkaError

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
TOLD_MAX = 4

log = structlog.get_logger()


class Outage:
    """What fails at present, if anything, in one place that retries."""

    def __init__(self, **place: Any) -> None:
        self._place = place
        # The kind, not the error: its traceback would keep the last session's producer alive.
        self._kind: type[Exception] | None = None
        self._told: set[tuple[type[Exception], str]] = set()
        self._since_s = 0.0
        self.backoff_s = 0.0

    def tell(self, error: Exception) -> None:
        """Note a failure; each is logged once in an outage, and only a few of them."""
        self.backoff_s = min(max(self.backoff_s * 2, BACKOFF_FIRST_S), BACKOFF_MAX_S)
        if self._kind is None:
            self._since_s = time.monotonic()
        text = " ".join(str(error).split())
        told = (type(error), text)
        # A server that goes down and comes up again says so in many ways.
        if isinstance(error, psycopg.OperationalError):
            told = (psycopg.OperationalError, "")
        self._kind = told[0]
        if told not in self._told and len(self._told) < TOLD_MAX:
            log.warning("waiting", reason=self._kind.__name__, error=text, **self._place)
            self._told.add(told)

    def end_of(self, *kinds: type[Exception]) -> None:
        """Note that what failed in one of these ways works again."""
        if self._kind is not None and issubclass(self._kind, kinds):
            log.info("recovered", after_s=round(self.lasted_s, 1), **self._place)
            self._kind = None
            self._told.clear()
            self.backoff_s = 0.0

    @property
    def ongoing(self) -> bool:
        """Whether something fails at present."""
        return self._kind is not None

    @property
    def lasted_s(self) -> float:
        """For how long it has failed; 0 when nothing does."""
        return 0.0 if self._kind is None else time.monotonic() - self._since_s


class BrokerReports:
    """Logs Kafka's troubles once, and their end; the client repeats its reports for ever."""

    # One broker's lost connection is librdkafka's everyday business.
    EVERYDAY = frozenset(
        {
            KafkaError._TRANSPORT,  # noqa: SLF001
            KafkaError._TIMED_OUT,  # noqa: SLF001
            KafkaError._RESOLVE,  # noqa: SLF001
            KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
        }
    )

    def __init__(self, retried: Callable[[str], None]) -> None:
        self._retried = retried
        self._said: set[str] = set()

    def report(self, error: KafkaError) -> None:
        """Take a report of a client (its `error_cb`)."""
        self._retried(error.name())
        if error.code() not in self.EVERYDAY and error.name() not in self._said:
            self._said.add(error.name())
            log.warning("kafka fails", reason=error.name(), error=error.str())

    def recovered(self) -> None:
        """Note that Kafka has acknowledged everything."""
        if self._said:
            log.info("kafka works again", reasons=sorted(self._said))
            self._said.clear()
