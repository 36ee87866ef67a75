"""How far events have come, all the time: committed, published, loaded. And how long it took.

A thread each, which may hang with the server that it asks: a server that is away has no figure.
"""

import threading
import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import Self

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from chaos.places import RESERVATION_TOPIC, Record, record_of

INTERVAL_S = 0.25
CONNECT_TIMEOUT_S = 3
JOIN_TIMEOUT_S = 60.0
RECENT_RECORDS = 4_000

COMMITTED = """
SELECT count(*) FROM outbox WHERE topic = 'concert-reservation' AND NOT headers ? 'chaos'
"""
LOADED = "SELECT count(*) FROM analytics.fct_reservation_events"


@dataclass
class Curve:
    """A count in time; it never falls, so of an outage nothing is lost but its steps."""

    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, count: int) -> None:
        """Take a count down."""
        self.counts.append(count)
        self.times_s.append(time.monotonic())

    def after(self, at_s: float) -> int | None:
        """Return the first count behind `at_s`."""
        place = bisect_left(self.times_s, at_s)
        return self.counts[place] if place < len(self.times_s) else None

    def reached(self, count: int, at_s: float) -> float | None:
        """Return when it had reached `count`, behind `at_s`; None: not yet."""
        place = bisect_left(self.times_s, at_s)
        for moment_s, found in zip(self.times_s[place:], self.counts[place:], strict=False):
            if found >= count:
                return moment_s
        return None


class Gauges:
    """Watches while its block runs. `recent` are records as they came, of late."""

    def __init__(self, outbox_url: str, analytics_url: str, bootstrap_servers: str) -> None:
        self.committed, self.published, self.loaded = Curve(), Curve(), Curve()
        self.recent: deque[Record] = deque(maxlen=RECENT_RECORDS)
        self._bootstrap_servers = bootstrap_servers
        self._stop = threading.Event()
        watches = (
            lambda: self._count(outbox_url, COMMITTED, self.committed),
            lambda: self._count(analytics_url, LOADED, self.loaded),
            self._read,
        )
        self._threads = [threading.Thread(target=watch, daemon=True) for watch in watches]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT_S)

    def recovered_s(self, curve: Curve, mended_s: float) -> float | None:
        """How long behind `mended_s` all that was committed then was in `curve`; None: not yet."""
        wanted = self.committed.after(mended_s)
        if wanted is None:
            return None
        reached_s = curve.reached(wanted, mended_s)
        return None if reached_s is None else reached_s - mended_s

    def _count(self, url: str, statement: str, curve: Curve) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                with psycopg.connect(
                    url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S
                ) as connection:
                    while not self._stop.wait(INTERVAL_S):
                        found = connection.execute(statement).fetchone()
                        curve.add(int(found[0]) if found else 0)
            except psycopg.Error:
                continue  # it is away, which is what is measured

    def _read(self) -> None:
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap_servers,
                "group.id": "chaos-gauges",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "reconnect.backoff.max.ms": 1_000,
                "log_level": 0,
            }
        )
        try:
            consumer.assign(
                [TopicPartition(RESERVATION_TOPIC, number, OFFSET_BEGINNING) for number in range(6)]
            )
            seen: set[bytes] = set()
            while not self._stop.is_set():
                for message in consumer.consume(1_000, INTERVAL_S):
                    if message.error() is None and not (record := record_of(message)).mark:
                        seen.add(record.value or b"")
                        self.recent.append(record)
                self.published.add(len(seen))
        finally:
            consumer.close()
