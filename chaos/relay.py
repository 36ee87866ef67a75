"""Two relays under faults: every event once, each key in order, for a read_committed reader."""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psycopg
from confluent_kafka import KafkaException

from chaos.faults import Fault, Faults
from devstack.kafka import KafkaCluster
from devstack.processes import Process, wait_until
from outbox_relay.producer import make_admin
from tests.outbox_relay.records import read_topic
from tests.outbox_relay.scenes import ExactlyOnceOutbox
from tests.outbox_relay.writers import Verdict, Writers, judge

RELAYS = 2
PAUSE_S = (1.5, 4.0)
# Both shorter and longer than a frozen leader keeps its lock.
FREEZE_S = (1.0, 12.0)
BROKER_DOWN_S = (2.0, 5.0)
BURST_ROWS = 20
STOP_TIMEOUT_S = 15.0
DRAIN_TIMEOUT_S = 180.0
READ_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 5.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a run has shown. `terms` counts how often a relay has begun to lead."""

    seed: int
    seconds: float
    strikes: dict[str, int]
    terms: int
    drained_after_s: float
    verdict: Verdict

    @property
    def good(self) -> bool:
        """Whether nothing was lost, doubled, invented or reordered."""
        verdict = self.verdict
        return not (verdict.lost or verdict.doubled or verdict.invented or verdict.reordered)

    def as_json(self) -> dict[str, Any]:
        """The figures, with their units in their names."""
        return {**asdict(self), "good": self.good}


class Relays:
    """Some relays of one name, each started again when it is killed. A context manager."""

    def __init__(self, outbox: ExactlyOnceOutbox, logs: Path) -> None:
        self._environment = os.environ | outbox.environment()
        self._owner_url = outbox.database.owner_url
        self._logs = logs
        self._cleanup = ExitStack()
        self._processes = [self._start(number) for number in range(1, RELAYS + 1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def kill_one(self, chance: random.Random) -> tuple[float, Callable[[], None]]:
        """SIGKILL; its successor starts at once."""
        number = chance.randrange(RELAYS)
        self._processes[number].kill()
        self._processes[number] = self._start(number + 1)
        return 0.0, lambda: None

    def kill_leader(self, _chance: random.Random) -> tuple[float, Callable[[], None]] | None:
        """SIGKILL the one that leads, when one does: its successor begins a term."""
        with psycopg.connect(self._owner_url) as connection:
            pid = leader_pid(connection)
        for number, process in enumerate(self._processes):
            if process.pid == pid:
                process.kill()
                self._processes[number] = self._start(number + 1)
                return 0.0, lambda: None
        return None

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
            [sys.executable, "-m", "outbox_relay", "run"],
            name=f"relay {number}",
            log=self._logs / f"relay-{number}.log",
            env=self._environment,
        )
        self._cleanup.callback(process.stop, STOP_TIMEOUT_S)
        # A frozen one doesn't see SIGTERM.
        self._cleanup.callback(process.resume)
        return process


class Brokers:
    """Brokers of which one at most is away: with two away nothing could be acknowledged."""

    def __init__(self, cluster: KafkaCluster) -> None:
        self._cluster = cluster
        # A collected one would drop its futures; one that lives needs no new connections.
        self._admin = make_admin({"bootstrap.servers": cluster.bootstrap_servers})

    def kill_one(self, chance: random.Random) -> tuple[float, Callable[[], None]] | None:
        """SIGKILL, when all replicas are in sync; it is started again a little later."""
        if not self.in_sync():
            return None
        broker = chance.choice(self._cluster.brokers)
        broker.kill()
        return chance.uniform(*BROKER_DOWN_S), broker.launch

    def in_sync(self) -> bool:
        """Whether every partition has all its replicas."""
        try:
            topics = self._admin.list_topics(timeout=REQUEST_TIMEOUT_S).topics
        except KafkaException:
            return False
        return all(
            len(partition.isrs) == len(partition.replicas)
            for topic in topics.values()
            for partition in topic.partitions.values()
        )


def run(
    outbox: ExactlyOnceOutbox,
    cluster: KafkaCluster,
    logs: Path,
    *,
    seconds: float,
    events: int,
    seed: int,
    progress: Progress = lambda _events, _strikes: None,
) -> Outcome:
    """Write `events` events in `seconds` while relays and brokers are struck; then audit.

    Raises:
        RuntimeError: a relay ended by itself.
        TimeoutError: the relays didn't publish the rest within DRAIN_TIMEOUT_S.
    """
    writers = Writers(
        outbox.database.owner_url,
        outbox.topic,
        seed,
        burst_rows=BURST_ROWS,
        events_per_s=events / seconds,
    )
    writers.prepare()
    began = time.monotonic()
    brokers = Brokers(cluster)
    with Relays(outbox, logs) as relays:
        kinds = [
            Fault("leading relay killed", 4, relays.kill_leader),
            Fault("relay killed", 2, relays.kill_one),
            Fault("relay frozen", 4, relays.freeze_one),
        ]
        if len(cluster.brokers) > 1:
            kinds.append(Fault("broker killed", 2, brokers.kill_one))
        faults = Faults(kinds, seed, PAUSE_S)

        def enough() -> bool:
            relays.check_alive()
            progress(writers.events, faults.struck.total())
            return time.monotonic() - began >= seconds and writers.events >= events

        with writers.running():
            faults.run(enough)
        mended = time.monotonic()
        cluster.wait_ready()
        wait_until(lambda: outbox.status()["lag_rows"] == 0, DRAIN_TIMEOUT_S, "no lag")
        drained_after_s = time.monotonic() - mended
    records = read_topic(outbox.bootstrap_servers, outbox.topic, timeout_s=READ_TIMEOUT_S)
    published = [(record.key, int(json.loads(record.value)["number"])) for record in records]
    return Outcome(
        seed=seed,
        seconds=round(time.monotonic() - began, 1),
        strikes=dict(faults.struck),
        terms=_terms(outbox),
        drained_after_s=round(drained_after_s, 1),
        verdict=judge(outbox.database.owner_url, published),
    )


def leader_pid(connection: psycopg.Connection[Any], name: str | None = None) -> int | None:
    """The process of the relays `name` (of any) that was the last to begin to lead.

    It may have ended since. (Its log tells only that it led once, its CPU hardly anything.)
    """
    found = connection.execute(
        "SELECT leader FROM outbox_relay_cursor WHERE relay_name = coalesce(%s, relay_name)"
        " ORDER BY leader_epoch DESC LIMIT 1",
        [name],
    ).fetchone()
    return int(str(found[0]).rpartition(":")[2]) if found else None


def _terms(outbox: ExactlyOnceOutbox) -> int:
    with psycopg.connect(outbox.database.owner_url) as connection:
        found = connection.execute("SELECT max(leader_epoch) FROM outbox_relay_cursor").fetchone()
    return 0 if found is None or found[0] is None else int(found[0])
