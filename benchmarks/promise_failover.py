"""What becomes of publishing when its broker or its relay goes.

Three brokers of their own, every topic on all of them; two relays, of which one leads. Events are
committed at a steady rate; then a broker is killed (SIGKILL) that leads partitions of the topic,
one that is the active controller as well or one that isn't, or the leading relay is killed, or it
is asked to end (SIGTERM); beside it a round in which nothing happens. `gap_s` is the longest time
without a record in any of the partitions (transactions are in all of them), by the brokers' own
stamps; `latest_s` the longest from an event's commit to its stamp. Each key has one event, so what
is read back tells of lost and doubled ones, and nothing of order.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise

import psycopg
from confluent_kafka import ElectionType

from benchmarks import events, latency, load
from benchmarks.arrivals import MILLISECONDS, Arrivals, Reader, Verdict
from benchmarks.promise_group import broker_setting_s
from benchmarks.results import Figure, Results
from benchmarks.surroundings import RELAY_START_TIMEOUT_S, RELAY_STOP_TIMEOUT_S, Surroundings, says
from chaos.relay import leader_pid
from devstack.kafka import KafkaCluster
from devstack.parts import new_kafka
from devstack.processes import Process, succeed, wait_until
from devstack.stack import COMMAND_TIMEOUT_S
from outbox_relay.producer import make_admin

FAILOVER = "promise failover"
NOTHING, BROKER, CONTROLLER, KILLED, STOPPED = (
    "nothing struck",
    "broker killed that leads",
    "broker killed that leads and is the controller",
    "leading relay killed",
    "leading relay stopped",
)
BROKERS, RATE = 3, 200
NAME = "bench-failover"
BEFORE_S, LOAD_S = 2, 12
WARM_UP_ROWS = 5_000
IN_SYNC_TIMEOUT_S, ARRIVE_TIMEOUT_S, LOOK_EVERY_S = 90.0, 60.0, 0.5
SESSION = "broker.session.timeout.ms"


@dataclass
class Scene:
    """The brokers and the relays; the first of these leads."""

    around: Surroundings
    kafka: KafkaCluster
    relays: list[Process] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a program of ours use these brokers."""
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "OUTBOX_RELAY_NAME": NAME,
        }

    def make_topics(self) -> None:
        """Make the topics; a record's time is when its broker took it."""
        arguments = ("topics", "--replication-factor", str(BROKERS))
        succeed(
            self.around.program(
                "outbox_relay", *arguments, name=f"{NAME}-topics", env=self.environment
            ),
            COMMAND_TIMEOUT_S,
        )
        self.kafka.set_topic_config(events.TOPIC, {"message.timestamp.type": "LogAppendTime"})

    def start_relay(self) -> None:
        """Start one more; it leads when there is none."""
        name = f"{NAME}-{next(self._numbers)}"
        self.relays.append(
            self.around.program("outbox_relay", "run", name=name, env=self.environment)
        )
        sign = '"leading"' if len(self.relays) == 1 else '"standing by"'
        self.relays[-1].wait_ready(says(self.relays[-1].log, sign), RELAY_START_TIMEOUT_S)

    def lose_leader(self, how: signal.Signals) -> None:
        """Strike the relay that leads."""
        leader = wait_until(self._leader, RELAY_START_TIMEOUT_S, "a relay to lead")
        assert leader  # noqa: S101 - waited for
        self.relays.remove(leader)
        leader.send_signal(how)

    def _leader(self) -> Process | None:
        with psycopg.connect(self.around.owner_url) as connection:
            pid = leader_pid(connection, NAME)
        return next((process for process in self.relays if process.pid == pid), None)

    def mend(self) -> None:
        """Start what was struck, and wait until all is as before."""
        for broker in self.kafka.brokers:
            broker.launch()
        self.kafka.wait_ready()
        wait_until(self._in_sync, IN_SYNC_TIMEOUT_S, "all replicas in sync")
        # Kafka does it by itself only after minutes.
        admin = make_admin({"bootstrap.servers": self.kafka.bootstrap_servers})
        admin.elect_leaders(ElectionType.PREFERRED).result(IN_SYNC_TIMEOUT_S)
        wait_until(
            lambda: len(self.led_partitions()) == BROKERS, IN_SYNC_TIMEOUT_S, "each broker to lead"
        )
        wait_until(self._leader, RELAY_START_TIMEOUT_S, "a relay to lead")
        if len(self.relays) == 1:
            self.start_relay()

    def _in_sync(self) -> bool:
        admin = make_admin({"bootstrap.servers": self.kafka.bootstrap_servers})
        topics = admin.list_topics(timeout=COMMAND_TIMEOUT_S).topics.values()
        return all(
            len(part.isrs) == len(part.replicas)
            for topic in topics
            for part in topic.partitions.values()
        )

    def led_partitions(self) -> dict[int, set[int]]:
        """Return which partitions of the events' topic each broker leads, by its node id."""
        admin = make_admin({"bootstrap.servers": self.kafka.bootstrap_servers})
        topic = admin.list_topics(events.TOPIC, timeout=COMMAND_TIMEOUT_S).topics[events.TOPIC]
        led: dict[int, set[int]] = {}
        for number, part in topic.partitions.items():
            led.setdefault(part.leader, set()).add(number)
        return led


def measure(around: Surroundings, results: Results, rounds: int) -> None:
    """Strike each of them `rounds` times."""
    with results.tolerating({"section": FAILOVER, "contender": "all"}), _scene(around) as scene:
        session_s = broker_setting_s(scene.kafka, SESSION)
        _warm_up(scene)
        for what in (NOTHING, BROKER, CONTROLLER, KILLED, STOPPED):
            for number in range(1, 2 if what == NOTHING else rounds + 1):
                labels = {"section": FAILOVER, "contender": what, "round": number}
                with around.steps.step(f"{what}, round {number}"):
                    results.attempt(
                        labels | {"session_s": session_s},
                        lambda w=what: _round(scene, w),  # type: ignore[misc]
                    )


def _warm_up(scene: Scene) -> None:
    arrivals = Arrivals(scene.kafka.bootstrap_servers, events.TOPIC, events.PARTITIONS)
    backlog = events.write_backlog(scene.around.owner_url, WARM_UP_ROWS)
    if await_all(arrivals, backlog.rows).lost:
        raise TimeoutError(f"{WARM_UP_ROWS:,} events did not come in {ARRIVE_TIMEOUT_S:g} s")


def _round(scene: Scene, what: str) -> Figure:
    around = scene.around
    arrivals = Arrivals(scene.kafka.bootstrap_servers, events.TOPIC, events.PARTITIONS)
    after_id = events.last_id(around.owner_url)
    writers = load.start(around, load.SINGLE, clients=latency.CLIENTS, seconds=LOAD_S, rate=RATE)
    time.sleep(BEFORE_S)
    _strikes(scene)[what]()
    per_s = writers.finish()
    scene.mend()
    committed = latency.commit_times(around, after_id)
    verdict = await_all(arrivals, len(committed))
    stamps: dict[int, list[float]] = {}
    latest_s = 0.0
    with Reader(scene.kafka.bootstrap_servers, events.TOPIC, arrivals.begin) as reader:
        for message in reader.until_end():
            key, at_s = message.key() or b"", message.timestamp()[1] / MILLISECONDS
            stamps.setdefault(message.partition() or 0, []).append(at_s)
            latest_s = max(latest_s, at_s - committed[key])
    return {
        "events": len(committed),
        "written_per_s": round(per_s),
        "gap_s": round(longest_gap_s(stamps), 2),
        "latest_s": round(latest_s, 2),
        **verdict.summary(),
    }


def _strikes(scene: Scene) -> Mapping[str, Callable[[], object]]:
    """Return how each is struck."""

    def kill_another_broker() -> None:
        controller = scene.kafka.controller()
        next(broker for broker in scene.kafka.brokers if broker is not controller).kill()

    return {
        NOTHING: lambda: None,
        BROKER: kill_another_broker,
        CONTROLLER: lambda: scene.kafka.controller().kill(),
        KILLED: lambda: scene.lose_leader(signal.SIGKILL),
        STOPPED: lambda: scene.lose_leader(signal.SIGTERM),
    }


def longest_gap_s(stamps: Mapping[int, Sequence[float]]) -> float:
    """Return the longest time between two records of the same partition."""
    return max(
        (
            later - earlier
            for found in stamps.values()
            for earlier, later in pairwise(sorted(found))
        ),
        default=0.0,
    )


def await_all(arrivals: Arrivals, expected: int) -> Verdict:
    """Follow what has come, until all of it is there or ARRIVE_TIMEOUT_S are over."""
    until = time.monotonic() + ARRIVE_TIMEOUT_S
    while (verdict := arrivals.verify(expected)).lost and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
    return verdict


@contextmanager
def _scene(around: Surroundings) -> Iterator[Scene]:
    with ExitStack() as cleanup:
        kafka = new_kafka(around.stack.run, NAME, BROKERS)
        cleanup.callback(kafka.close)
        with around.steps.step("three brokers, two relays"):
            kafka.start()
            scene = Scene(around, kafka)
            cleanup.callback(_end_relays, scene)
            scene.make_topics()
            for _ in range(2):
                scene.start_relay()
        yield scene


def _end_relays(scene: Scene) -> None:
    for process in scene.relays:
        process.stop(RELAY_STOP_TIMEOUT_S)
