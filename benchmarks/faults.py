"""What each publisher loses, doubles or reorders while it, Kafka and Postgres are struck.

Everybody has the same load and the same script of faults: writers commit events of many keys, each
key's in order, some in transactions that stay open for a second, so that ids become visible out of
order; meanwhile the publisher is killed twice (the second time with a backlog, as Kafka is back)
and frozen, Kafka killed, Postgres restarted at once. Of two instances the one that works is struck.
Whoever ends is started again; how often one ended by itself is a figure. In the end the whole topic
is compared with the table, as a `read_committed` consumer reads it. `late_s` is how long the latest
event around each fault took from its commit to a consumer.
"""

import json
import math
import random
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import psycopg
from confluent_kafka import Message
from psycopg import sql

from benchmarks import contenders, events
from benchmarks.arrivals import Reader
from benchmarks.debezium import EXACTLY_ONCE, LOW_LATENCY, Connect, topic_of
from benchmarks.processes import tree_cpu_s
from benchmarks.results import WRONG, Figure, Results
from benchmarks.shop import own_outbox
from benchmarks.surroundings import DELIVERIES, Surroundings, relay_environment, relay_name
from chaos.relay import leader_pid
from chaos.supervisor import Part, Supervisor
from devstack.processes import Process, wait_until
from tests.outbox_relay.writers import compare

EVENTS_PER_S = 300
KEYS = [f"key-{number:04}" for number in range(1_000)]
SHORT_WRITERS, LONG_WRITERS = 4, 2
HELD_S = (0.2, 1.0)
INSTANCES = 2
RETRY_S = 0.1
CONNECT_TIMEOUT_S = 5
READY_TIMEOUT_S = 60.0
LOOK_S = 1.0
MEND_EVERY_S = 1.0
POLL_S = 0.1
OVERCOME_S = 60.0
# Nothing more for so long: what is missing then is lost. A JVM needs its time to start again.
STALLED_S = 90.0
QUIET_S = 3.0
# An event that was under way when a fault struck.
UNDER_WAY_S = 1.0
DEBEZIUM_ONCE = "debezium, exactly once"
# `invented`: what a crash took back, and Kafka has.
PROMISED = {
    "exactly_once": (*WRONG, "invented"),
    "at_least_once": ("lost", "reordered", "invented"),
}

KEYS_TABLE = """
DROP TABLE IF EXISTS bench_fault_keys;
CREATE TABLE bench_fault_keys (key text PRIMARY KEY, number bigint NOT NULL DEFAULT 0)
"""
FILL_KEYS = "INSERT INTO bench_fault_keys SELECT unnest(%s::text[])"
# The number is drawn while the key's row is locked: in the topic those of a key must rise.
WRITE = """
WITH next AS (
    UPDATE bench_fault_keys SET number = number + 1 WHERE key = %(key)s RETURNING key, number
)
INSERT INTO {table} (topic, key, payload)
SELECT %(topic)s, key, json_build_object('number', number) FROM next
RETURNING key, (payload ->> 'number')::bigint
"""
TRUTH = "SELECT key, (payload ->> 'number')::bigint FROM {table}"

Event = tuple[str, int]
Struck = Sequence[tuple[str, float]]


# ---- what is struck, and when


@dataclass(frozen=True)
class Strike:
    """A fault of a script: when it comes and how long it lasts, as shares of the duration."""

    name: str
    at: float
    lasts: float = 0.0
    # On top of the one before, without waiting until that one is overcome.
    at_once: bool = False


SCRIPT = (
    Strike("publisher killed", 0.10),
    Strike("Kafka killed", 0.25, 0.08),
    Strike("killed with a backlog", 0.34, at_once=True),
    Strike("Postgres restarted", 0.55),
    Strike("publisher frozen", 0.70, 0.15),
)
Deeds = Mapping[str, Callable[[float], object]]


def strike(
    script: Sequence[Strike],
    seconds: float,
    deeds: Deeds,
    works_since: Callable[[float], bool] = lambda _: True,
) -> Struck:
    """Do each deed in its time, told how many seconds it lasts; return when each began.

    Who isn't at work again yet (`works_since` the last deed's end) has OVERCOME_S more for it: a
    fault proves nothing of somebody who is still starting.
    """
    began, struck, ended = time.monotonic(), [], -math.inf
    for one in script:
        time.sleep(max(0.0, began + one.at * seconds - time.monotonic()))
        patient_until = time.monotonic() + OVERCOME_S
        while not (one.at_once or works_since(ended) or time.monotonic() > patient_until):
            time.sleep(POLL_S)
        struck.append((one.name, time.monotonic()))
        deeds[one.name](one.lasts * seconds)
        ended = time.monotonic()
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    return struck


def busiest(parts: Sequence[Part]) -> Part:
    """Return the one that uses most of the CPU in LOOK_S: the leader, where there is one."""
    pids = [part.pid or 0 for part in parts]
    before = [tree_cpu_s(pid) for pid in pids]
    if len(parts) > 1:
        time.sleep(LOOK_S)
    used = [tree_cpu_s(pid) - was for pid, was in zip(pids, before, strict=True)]
    return parts[used.index(max(used))]


def freeze(part: Part, seconds: float) -> None:
    """Stop it for a while (SIGSTOP)."""
    with part.frozen():
        time.sleep(seconds)


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread, which is told when the block ends; its failure is raised then."""
    ended = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work, ended)
        try:
            yield
        finally:
            ended.set()
        working.result()


@contextmanager
def mended(mend: Callable[[], int]) -> Iterator[list[int]]:
    """Call `mend` again and again while the block runs; the list adds up what it has returned."""
    counted = [0]

    def work(ended: threading.Event) -> None:
        while not ended.wait(MEND_EVERY_S):
            counted[0] += mend()

    with meanwhile(work):
        yield counted


@contextmanager
def supervised(
    around: Surroundings, name: str, *command: str, env: Mapping[str, str] | None = None
) -> Iterator[Part]:
    """Start a program that a supervisor can start again; it ends with the block."""
    (around.stack.run.path / f"{name}.log").unlink(missing_ok=True)
    started: list[Process] = []

    def launch() -> None:
        started.append(around.program(*command, name=name, env=env))

    launch()
    part = Part(name, launch, lambda: started[-1])
    try:
        yield part
    finally:
        part.end()


# ---- the load, and what becomes of it


@dataclass
class Writers:
    """Commit events until their block ends; a Postgres that is away is waited for.

    `committed` tells when each event was known to be committed.
    """

    url: str
    table: str
    committed: dict[Event, float] = field(default_factory=dict)
    _began: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write while the block runs."""
        with psycopg.connect(self.url) as connection:
            connection.execute(KEYS_TABLE)
            connection.execute(FILL_KEYS, [KEYS])
        self._began = time.monotonic()
        with ExitStack() as threads:
            for number in range(SHORT_WRITERS + LONG_WRITERS):
                threads.enter_context(meanwhile(lambda ended, n=number: self._write(ended, n)))  # type: ignore[misc]
            yield

    def truth(self) -> set[Event]:
        """Return what is committed, as the table tells."""
        with psycopg.connect(self.url) as connection:
            return set(connection.execute(self._named(TRUTH)).fetchall())

    def _write(self, ended: threading.Event, number: int) -> None:
        chance = random.Random(number)  # noqa: S311 - the same each time
        while not ended.is_set():
            with (
                suppress(psycopg.OperationalError),  # Postgres is away
                psycopg.connect(
                    self.url, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S
                ) as connection,
            ):
                while not ended.is_set():
                    self._commit(connection, chance, ended, held=number < LONG_WRITERS)
            ended.wait(RETRY_S)

    def _commit(
        self,
        connection: psycopg.Connection,
        chance: random.Random,
        ended: threading.Event,
        *,
        held: bool,
    ) -> None:
        """Commit events of some keys, in the keys' order, so that nobody waits in a circle."""
        written: list[Event] = []
        with connection.transaction():
            for key in sorted(chance.sample(KEYS, 1 + chance.randrange(2))):
                names = {"key": key, "topic": events.TOPIC}
                written += connection.execute(self._named(WRITE), names).fetchall()
                if held:
                    ended.wait(chance.uniform(*HELD_S))
        self.committed.update(dict.fromkeys(written, time.monotonic()))
        ended.wait(max(0.0, self._began + len(self.committed) / EVENTS_PER_S - time.monotonic()))

    def _named(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(table=sql.Identifier(self.table))


class Consumer:
    """Reads a topic as it is filled; `arrived` tells when each event came first."""

    def __init__(self, around: Surroundings, topic: str) -> None:
        self.arrived: dict[Event, float] = {}
        self.latest = -math.inf
        self._around, self._topic = around, topic
        self._begin = around.arrivals(topic).begin

    def listen(self, ended: threading.Event) -> None:
        """Read until `ended`."""
        with Reader(self._around.bootstrap_servers, self._topic, self._begin) as reader:
            while not ended.is_set():
                if message := reader.poll(POLL_S):
                    self.latest = time.monotonic()
                    self.arrived.setdefault(_event(message), self.latest)

    def await_all(self, truth: set[Event]) -> None:
        """Wait until everything is there and nothing more comes, or nothing for STALLED_S."""
        began = time.monotonic()
        while True:
            quiet_s = time.monotonic() - max(began, max(self.arrived.values(), default=began))
            if quiet_s > (QUIET_S if truth <= self.arrived.keys() else STALLED_S):
                return
            time.sleep(POLL_S)

    def read_again(self) -> list[Event]:
        """Read everything from the beginning on, each partition in order."""
        with Reader(self._around.bootstrap_servers, self._topic, self._begin) as reader:
            return [_event(message) for message in reader.until_end()]


def _event(message: Message) -> Event:
    return (message.key() or b"").decode(), int(json.loads(message.value() or b"")["number"])


def lateness(
    struck: Struck, committed: Mapping[Event, float], arrived: Mapping[Event, float]
) -> dict[str, float]:
    """Return for each fault how many seconds the latest event committed around it took.

    Around it is from a moment before it until a moment before the next one.
    """
    begins = [at - UNDER_WAY_S for _, at in struck]
    late = [0.0] * len(struck)
    for event in committed.keys() & arrived.keys():
        if place := bisect_right(begins, committed[event]):
            late[place - 1] = max(late[place - 1], arrived[event] - committed[event])
    return {name: round(seconds, 1) for (name, _), seconds in zip(struck, late, strict=True)}


# ---- the publishers


@dataclass(frozen=True)
class Publisher:
    """Somebody who publishes a table to a topic; `mend` restarts what a supervisor can't see."""

    topic: str
    table: str
    parts: Sequence[Part]
    mend: Callable[[], int] = int
    leading: Callable[[Sequence[Part]], Part] = busiest


Runs = Callable[[], AbstractContextManager[Publisher]]


def measure(around: Surroundings, results: Results, seconds: int, *, peers: bool) -> None:
    """Audit each publisher."""
    contenders_: dict[str, Runs] = {
        name: lambda n=name: _relays(around, n)  # type: ignore[misc]
        for name in DELIVERIES
    }
    contenders_["polling"] = lambda: _polling(around)
    if peers:
        contenders_["debezium"] = lambda: _debezium(around)
        contenders_[DEBEZIUM_ONCE] = lambda: _debezium(around, exactly_once=True)
    for name, runs in contenders_.items():
        labels = {"section": "faults", "contender": name, "promised": PROMISED.get(name, ())}
        with around.steps.step(f"faults: {name}"), own_outbox(around):
            results.attempt(labels, lambda r=runs: _audit(around, r, seconds))  # type: ignore[misc]


def order(around: Surroundings, seconds: int) -> Figure:
    """Return what becomes of the order of keys with many events, in overlapping transactions."""
    found = _audit(around, lambda: _relays(around, "exactly_once"), seconds)
    wrongs = {name: found[name] for name in ("lost", "doubled", "reordered", "invented")}
    records = found["events"] - found["lost"] + found["doubled"] + found["invented"]
    return {"keys": len(KEYS), "records": records, **wrongs}


def _audit(around: Surroundings, runs: Runs, seconds: int) -> Figure:
    with runs() as publisher:
        parts, broker = publisher.parts, around.kafka.brokers[0]
        consumer = Consumer(around, publisher.topic)
        writers = Writers(around.owner_url, publisher.table)
        in_vain: list[bool] = []
        with (
            Supervisor(parts),
            mended(publisher.mend) as failed_tasks,
            meanwhile(consumer.listen),
        ):

            def kill(_: float) -> None:
                in_vain.append(not publisher.leading(parts).kill())

            def restart_kafka(lasts_s: float) -> None:
                broker.kill()
                time.sleep(lasts_s)
                broker.start()

            def restart_postgres(_: float) -> None:
                around.stack.reservations.stop("immediate")
                around.stack.reservations.start()

            deeds: Deeds = {
                "publisher killed": kill,
                "Kafka killed": restart_kafka,
                "killed with a backlog": kill,
                "Postgres restarted": restart_postgres,
                "publisher frozen": lambda lasts_s: freeze(publisher.leading(parts), lasts_s),
            }
            began = time.monotonic()
            with writers.running():
                struck = strike(SCRIPT, seconds, deeds, lambda since: consumer.latest > since)
            lasted_s = time.monotonic() - began
            truth = writers.truth()
            consumer.await_all(truth)
    verdict = compare(truth, consumer.read_again())
    late_s = lateness(struck, writers.committed, consumer.arrived)
    return {
        # Longer than meant where somebody needed their time to start.
        "seconds": round(lasted_s, 1),
        "events": verdict.committed,
        "lost": verdict.lost,
        "doubled": verdict.doubled,
        "reordered": verdict.reordered,
        "invented": verdict.invented,
        "restarted": sum(part.ended_by_itself for part in parts) + failed_tasks[0],
        # Strikes at somebody who had ended already.
        "in_vain": sum(in_vain),
        "late_s": late_s,
        "latest_s": max(late_s.values()),
    }


@contextmanager
def _relays(around: Surroundings, delivery: str) -> Iterator[Publisher]:
    """Ours: one leads, the other stands by."""
    environment = relay_environment(delivery)
    with _instances(around, relay_name(delivery), "outbox_relay", "run", env=environment) as parts:
        _await_sign(around, parts, '"leading"')
        name = relay_name(delivery)
        yield Publisher(events.TOPIC, "outbox", parts, leading=partial(_leader, around, name))


def _leader(around: Surroundings, name: str, parts: Sequence[Part]) -> Part:
    def leading() -> Part | None:
        with (
            suppress(psycopg.OperationalError),  # it is being restarted
            psycopg.connect(around.owner_url, connect_timeout=CONNECT_TIMEOUT_S) as connection,
        ):
            pid = leader_pid(connection, name)
            return next((part for part in parts if part.pid == pid), None)
        return None

    part = wait_until(leading, OVERCOME_S, f"one of the relays {name} to lead")
    assert part  # noqa: S101 - waited for
    return part


@contextmanager
def _polling(around: Surroundings) -> Iterator[Publisher]:
    """Most people's: both take what the other has not locked."""
    topic = topic_of("polling-faults")
    around.make_topic(topic)
    with psycopg.connect(around.owner_url) as connection:
        connection.execute(contenders.POLLED_TABLE)
    command = ("benchmarks.contenders", "polling-service", topic)
    with _instances(around, "polling", *command) as parts:
        _await_sign(around, parts, "started")
        yield Publisher(topic, "bench_polled", parts)


@contextmanager
def _debezium(around: Surroundings, *, exactly_once: bool = False) -> Iterator[Publisher]:
    """One process, as a slot has one reader; failed tasks are restarted by Connect's REST."""
    name = "debezium-faults-once" if exactly_once else "debezium-faults"
    settings = LOW_LATENCY | (EXACTLY_ONCE if exactly_once else {})
    topic = topic_of(name)
    around.make_topic(topic)
    with (
        Connect(around, exactly_once=exactly_once) as connect,
        connect.connector(name, settings, topic),
    ):
        part = Part(name, connect.launch, lambda: connect.process)
        yield Publisher(topic, "outbox", [part], connect.restart_failed)


@contextmanager
def _instances(
    around: Surroundings, name: str, *command: str, env: Mapping[str, str] | None = None
) -> Iterator[list[Part]]:
    with ExitStack() as running:
        yield [
            running.enter_context(supervised(around, f"{name}-{number}", *command, env=env))
            for number in range(1, INSTANCES + 1)
        ]


def _await_sign(around: Surroundings, parts: Sequence[Part], sign: str) -> None:
    logs = [around.stack.run.path / f"{part.name}.log" for part in parts]
    wait_until(lambda: any(sign in log.read_text("utf-8") for log in logs), READY_TIMEOUT_S, sign)
