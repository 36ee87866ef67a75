"""What a leader does beside publishing: keep the outbox small, and tell the metrics of the lag.

In a thread and on a connection of its own, so that neither a lock nor a long count delays an event.
Whatever fails here is tried again; it never ends a term.
"""

import threading

import psycopg
import structlog

from outbox_relay import cursor, leadership, sql, status
from outbox_relay.config import Settings
from outbox_relay.leadership import RefusedError
from outbox_relay.metrics import Metrics
from outbox_relay.outages import Outage
from outbox_relay.retention import Retention

INTERVAL_S = 5.0
# A step may make another one possible; a bound, so that the metrics get their turn.
STEPS_AT_ONCE = 8


class Housekeeping(threading.Thread):
    """Keeps house for one term."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(name="housekeeping", daemon=True)
        self._settings = settings
        self._metrics = metrics
        self._retention = Retention(settings.outbox_relay_retention_hours)
        self._outage = Outage(work="housekeeping")
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Ask it to end."""
        self._stopping.set()

    def run(self) -> None:
        """Keep house until stopped."""
        structlog.contextvars.bind_contextvars(relay=self._settings.outbox_relay_name)
        while not self._stopping.is_set():
            try:
                with leadership.connect(self._settings.database_url, "housekeeping") as connection:
                    # Between two rounds it is idle for longer than a leader's session may be.
                    connection.execute(sql.BE_PATIENT)
                    while not self._stopping.wait(INTERVAL_S):
                        self._keep_house(connection)
                        self._outage.end_of(Exception)
            except psycopg.OperationalError:
                self._stopping.wait(INTERVAL_S)  # the lanes notice, and say so
            except (psycopg.Error, RefusedError) as error:
                self._outage.tell(error)
                self._stopping.wait(self._outage.backoff_s)

    def _keep_house(self, connection: psycopg.Connection) -> None:
        outcome = self._retention.maintain(connection)
        for _ in range(STEPS_AT_ONCE):
            if outcome.did is None:
                break
            outcome = self._retention.maintain(connection)
        self._metrics.retention(outcome.partitions, outcome.default_filled)
        name = self._settings.outbox_relay_name
        for row in cursor.load_rows(connection, name):
            position = cursor.from_row(row).position
            self._metrics.lag(
                row["topic"], *status.lag_at_least(connection, row["topic"], position)
            )
        for topic, events in connection.execute(sql.QUARANTINE_COUNT, {"name": name}):
            self._metrics.quarantined(topic, events)
