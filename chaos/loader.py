"""Workers under faults: the tables hold what the reservations say, row for row."""

import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psycopg
from confluent_kafka import Producer

from chaos.faults import Fault, Faults
from devstack.kafka import KafkaCluster
from devstack.postgres import PostgresServer
from devstack.processes import Process, wait_until
from tests.data_platform.histories import FACTS, STATES, Event, history
from tests.databases import create_analytics_database

WORKERS = 3
PARTITIONS = 6
PAUSE_S = (1.5, 4.0)
# Both shorter and longer than a session.
FREEZE_S = (0.5, 5.0)
SESSION_TIMEOUT_MS = 2_000
STOP_TIMEOUT_S = 15.0
LOAD_TIMEOUT_S = 300.0
FLUSH_TIMEOUT_S = 60.0
# Reservations whose lives go on side by side, and events that may come again.
OPEN_LIVES = 500
RECENT_EVENTS = 2_000
DELIVERED_AGAIN = 10
TOPIC, CATALOGUE = "chaos-reservations", "chaos-catalogue"

SEATS = """
SELECT reservation_id, seat_id, section, "row", number, price
FROM analytics.fct_reservation_seats ORDER BY reservation_id, seat_id
"""
LOADED = "SELECT coalesce(sum(next_offset), 0)::bigint FROM analytics.load_offsets"
DEAD_LETTERS = "SELECT count(*) FROM analytics.dead_letters"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a run has shown."""

    seed: int
    seconds: float
    strikes: dict[str, int]
    database_restarts: int
    events: int
    records: int
    loaded_after_s: float
    differences: list[str]

    @property
    def good(self) -> bool:
        """Whether the tables say what the reservations say."""
        return not self.differences

    def as_json(self) -> dict[str, Any]:
        """The figures, with their units in their names."""
        return {**asdict(self), "good": self.good}


@dataclass
class Truth:
    """What the tables must say of the events so far."""

    facts: dict[tuple[str, int], tuple[Any, ...]] = field(default_factory=dict)
    latest: dict[str, Event] = field(default_factory=dict)

    def note(self, event: Event) -> None:
        """Take an event; a reservation's come in order."""
        self.facts[event.fact[0], event.fact[1]] = event.fact
        self.latest[event.fact[0]] = event

    def differences(self, url: str) -> list[str]:
        """Compare every row; name the tables that differ."""
        with psycopg.connect(url) as connection:
            dead = connection.execute(DEAD_LETTERS).fetchone()
            found = {
                "facts": connection.execute(FACTS).fetchall()
                != [self.facts[key] for key in sorted(self.facts)],
                "states": connection.execute(STATES).fetchall()
                != [self.latest[name].state for name in sorted(self.latest)],
                "seats": connection.execute(SEATS).fetchall() != sorted(self._seats()),
                "dead letters": dead != (0,),
            }
        return [name for name, differs in found.items() if differs]

    def _seats(self) -> Iterator[tuple[Any, ...]]:
        for name, event in self.latest.items():
            for seat in event.envelope["data"]["seats"]:
                columns = ("seat_id", "section", "row", "number", "price")
                yield (name, *(seat[column] for column in columns))


class Delivery(threading.Thread):
    """Produces events at an even pace, each tenth of them again a little later."""

    def __init__(self, bootstrap_servers: str, *, events: int, seconds: float, seed: int) -> None:
        super().__init__(name="delivery", daemon=True)
        self.truth = Truth()
        self.records = 0
        self.failure: BaseException | None = None
        self.stopped = threading.Event()
        self._events, self._seconds, self._seed = events, seconds, seed
        self._producer = Producer(
            {"bootstrap.servers": bootstrap_servers, "partitioner": "murmur2", "linger.ms": 5}
        )

    def run(self) -> None:
        """Produce until all is there."""
        try:
            self._deliver()
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.failure = error

    def _deliver(self) -> None:
        chance = random.Random(self._seed)  # noqa: S311 - the same events each time
        recent: deque[Event] = deque(maxlen=RECENT_EVENTS)
        began = time.monotonic()
        for number, event in enumerate(_lives(chance, self._events, self._seed), start=1):
            self.truth.note(event)
            recent.append(event)
            self._send(event)
            if number % DELIVERED_AGAIN == 0:
                self._send(chance.choice(recent))
            ahead_s = began + number * self._seconds / self._events - time.monotonic()
            if ahead_s > 0.05 and self.stopped.wait(ahead_s):
                return
        if self._producer.flush(FLUSH_TIMEOUT_S):
            raise TimeoutError("Kafka didn't take the events")

    def _send(self, event: Event) -> None:
        self._producer.produce(TOPIC, event.value, event.key)
        self.records += 1
        self._producer.poll(0)


def _lives(chance: random.Random, events: int, seed: int) -> Iterator[Event]:
    """Yield the events of many reservations side by side, each one's in order."""
    numbers = iter(range(seed * 10_000_000, (seed + 1) * 10_000_000))
    lives = [iter(history(1, next(numbers))) for _ in range(OPEN_LIVES)]
    for _ in range(events):
        place = chance.randrange(OPEN_LIVES)
        event = next(lives[place], None)
        while event is None:
            lives[place] = iter(history(1, next(numbers)))
            event = next(lives[place], None)
        yield event


class Workers:
    """Some workers of one group, each started again when it is killed. A context manager."""

    def __init__(self, environment: dict[str, str], logs: Path) -> None:
        self._environment = os.environ | environment
        self._logs = logs
        self._cleanup = ExitStack()
        self._processes = [self._start(number) for number in range(1, WORKERS + 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def kill_one(self, chance: random.Random) -> tuple[float, Callable[[], None]]:
        """SIGKILL; its successor starts at once."""
        number = chance.randrange(WORKERS)
        self._processes[number].kill()
        self._processes[number] = self._start(number + 1)
        return 0.0, lambda: None

    def freeze_one(self, chance: random.Random) -> tuple[float, Callable[[], None]]:
        """SIGSTOP for a while."""
        process = chance.choice(self._processes)
        process.pause()
        return chance.uniform(*FREEZE_S), process.resume

    def check_alive(self) -> None:
        """Raise when one has ended by itself: no fault may do that.

        Raises:
            RuntimeError: with the end of its log.
        """
        for process in self._processes:
            if not process.alive:
                raise RuntimeError(f"{process.name} ended by itself\n{process.log_tail()}")

    def _start(self, number: int) -> Process:
        process = Process(
            [sys.executable, "-m", "data_platform", "run"],
            name=f"worker {number}",
            log=self._logs / f"worker-{number}.log",
            env=self._environment,
        )
        self._cleanup.callback(process.stop, STOP_TIMEOUT_S)
        # A frozen one doesn't see SIGTERM.
        self._cleanup.callback(process.resume)
        return process


def run(
    server: PostgresServer,
    cluster: KafkaCluster,
    logs: Path,
    *,
    seconds: float,
    events: int,
    seed: int,
    progress: Progress = lambda _events, _strikes: None,
) -> Outcome:
    """Deliver `events` events in `seconds` while workers and database are struck; then compare.

    Raises:
        RuntimeError: a worker ended by itself.
        TimeoutError: the rest was not loaded within LOAD_TIMEOUT_S.
    """
    database = create_analytics_database(server, "analytics_chaos")
    cluster.create_topic(TOPIC, PARTITIONS)
    cluster.create_topic(CATALOGUE, 1)
    began = time.monotonic()
    restarts = _Restarts(server, [began + seconds * part for part in (1 / 3, 2 / 3)])
    with (
        Workers(_environment(database.loader_url, cluster, logs), logs) as workers,
        _delivering(cluster, events=events, seconds=seconds, seed=seed) as delivery,
    ):
        faults = Faults(
            [
                Fault("worker killed", 1, workers.kill_one),
                Fault("worker frozen", 1, workers.freeze_one),
            ],
            seed,
            PAUSE_S,
        )

        def enough() -> bool:
            workers.check_alive()
            restarts.take_place()
            progress(len(delivery.truth.facts), faults.struck.total())
            return not delivery.is_alive()

        faults.run(enough)
        delivery.join()
        if delivery.failure is not None:
            raise delivery.failure
        mended = time.monotonic()
        wait_until(
            lambda: _loaded(database.owner_url) >= delivery.records, LOAD_TIMEOUT_S, "the rest"
        )
        loaded_after_s = time.monotonic() - mended
        workers.check_alive()
    return Outcome(
        seed=seed,
        seconds=round(time.monotonic() - began, 1),
        strikes=dict(faults.struck),
        database_restarts=restarts.count,
        events=len(delivery.truth.facts),
        records=delivery.records,
        loaded_after_s=round(loaded_after_s, 1),
        differences=delivery.truth.differences(database.owner_url),
    )


class _Restarts:
    """Restarts of the database at given moments: a crash first, then in good order."""

    def __init__(self, server: PostgresServer, moments: list[float]) -> None:
        self._server, self._moments = server, moments
        self.count = 0

    def take_place(self) -> None:
        if self._moments and time.monotonic() >= self._moments[0]:
            self._moments.pop(0)
            if self.count == 0:
                self._server.kill()
            else:
                self._server.stop()
            self._server.start()
            self.count += 1


@contextmanager
def _delivering(
    cluster: KafkaCluster, *, events: int, seconds: float, seed: int
) -> Iterator[Delivery]:
    delivery = Delivery(cluster.bootstrap_servers, events=events, seconds=seconds, seed=seed)
    delivery.start()
    try:
        yield delivery
    finally:
        delivery.stopped.set()
        delivery.join()


def _environment(url: str, cluster: KafkaCluster, logs: Path) -> dict[str, str]:
    properties = logs / "chaos.properties"
    properties.write_text(
        f"session.timeout.ms={SESSION_TIMEOUT_MS}\nheartbeat.interval.ms=500\n", encoding="ascii"
    )
    return {
        "ANALYTICS_DATABASE_URL": url,
        "KAFKA_BOOTSTRAP_SERVERS": cluster.bootstrap_servers,
        "KAFKA_PROPERTIES_FILE": str(properties),
        "DATA_PLATFORM_GROUP": "chaos",
        # More seams to strike at.
        "DATA_PLATFORM_BATCH_ROWS": "50",
        "DATA_PLATFORM_RESERVATION_TOPIC": TOPIC,
        "DATA_PLATFORM_CATALOGUE_TOPIC": CATALOGUE,
    }


def _loaded(url: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute(LOADED).fetchone()
    return int(found[0]) if found else 0
