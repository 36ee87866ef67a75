"""What becomes of bookings while the data platform is slow, down or hangs, or Kafka is away.

`ways`: our way beside the old one (see `old_way`), each with a platform that is fine, slow by
200 ms, down, and one that hangs. Customers come at random moments, whether or not those before them
have been served; then, for `most_per_s`, as many as get an answer. What the platform has in the end
is compared with what was booked, event by event.

`kafka`: our way with Kafka frozen, refusing connections and black-holed, relay and worker running,
beside the same load without either; the stretches alternate, the latencies of each kind are pooled.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from benchmarks import old_way
from benchmarks.goals import TIMES, Goal
from benchmarks.latency import quantiles
from benchmarks.results import Figure, Results, find
from benchmarks.shop import Hall, Shop, make_hall, own_outbox, shop
from benchmarks.surroundings import Surroundings
from devstack.processes import DevstackError, Process, succeed
from devstack.stack import COMMAND_TIMEOUT_S
from devstack.state import free_port, port_answers
from tests.proxy import BreakableKafka, Proxy, breakable

RATE, KAFKA_RATE = 50, 150
LINES, MOST_LINES = 500, 32
MOST_SHARE = 3  # of a stretch's seconds, for the closed loop
MOST_PER_S = 4_000
SLOW_MS = 200
ARRIVAL_TIMEOUT_S = 120.0
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
QUIET_S = 1.0
P99_TIMES_ABSENT = 1.1

OURS, INSIDE, AFTER = "outbox", "call-inside", "call-after"
FINE, SLOW, DOWN, HANGS = "fine", f"slow by {SLOW_MS} ms", "down", "hangs"
STATES = (FINE, SLOW, DOWN, HANGS)
ABSENT = "relay and platform absent"
FAULTS = ("frozen", "refusing", "black-holed")
OUTBOX_RELAY = {"OUTBOX_RELAY_NAME": "bench-outage"}

BOOKED = "SELECT reservation_id::text FROM reservations WHERE created_at >= %s"
NOW = "SELECT clock_timestamp()"
LOADED = "SELECT DISTINCT reservation_id::text FROM analytics.fct_reservation_events"
RECEIVED = "SELECT reservation_id FROM bench_received"


@dataclass
class Stretch:
    """A load and what was booked in it."""

    answers: list[int] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    booked: set[str] = field(default_factory=set)

    @property
    def failed(self) -> int:
        """Customers who have no booking."""
        return sum(status != 201 for status in self.answers)


@dataclass(frozen=True)
class Scene:
    """What all stretches share: Kafka of its own, which can be broken, and two proxies."""

    around: Surroundings
    kafka: BreakableKafka
    analytics: Proxy

    def stretch(self, open_shop: Shop, hall: Hall, rate: float, seconds: float) -> Stretch:
        """Let customers come at random moments; return what came of it."""
        began = self._ask(NOW)[0]
        found = open_shop.book(
            hall,
            at_most=round(rate * seconds * 2) + 100,
            rate=rate,
            seconds=seconds,
            lines=LINES,
            keep_latencies=True,
        )
        answers = [int(s) for s, count in found["answers"].items() for _ in range(count)]
        booked = set(self._ask(BOOKED, began))
        return Stretch(answers, found["latencies_ms"], booked)

    def loaded(self) -> set[str]:
        """Return the reservations that the analysts' tables know."""
        return set(self._ask(LOADED, url=self._analytics_url))

    def booked_at_all(self) -> set[str]:
        """Return all reservations."""
        return set(self._ask(BOOKED, "-infinity"))

    def received(self) -> set[str]:
        """Return those that the old way's platform knows, when no more of them come."""
        found, until = self._received(), time.monotonic() + ARRIVAL_TIMEOUT_S
        while time.monotonic() < until:
            time.sleep(QUIET_S)
            before, found = found, self._received()
            if before == found:
                return found
        raise TimeoutError("the old way's platform never came to rest")

    def await_loaded(self, booked: set[str]) -> int:
        """Wait for every event; return how many never came."""
        until = time.monotonic() + ARRIVAL_TIMEOUT_S
        while (missing := booked - self.loaded()) and time.monotonic() < until:
            time.sleep(QUIET_S / 4)
        return len(missing)

    def must_lack(self, booked: set[str], fault: str) -> None:
        """Raise where events came through although a fault lasts: then it did not strike."""
        if came := booked & self.loaded():
            raise DevstackError(f"{fault}: {len(came)} events came through, it did not strike")

    @contextmanager
    def pipeline(self, bootstrap_servers: str) -> Iterator[None]:
        """Run relay and worker; all that is committed has arrived when the block begins."""
        environment = {
            **OUTBOX_RELAY,
            "KAFKA_BOOTSTRAP_SERVERS": bootstrap_servers,
            "ANALYTICS_DATABASE_URL": self._through_proxy(),
        }
        with ExitStack() as cleanup:
            for package in ("outbox_relay", "data_platform"):
                process = self.around.program(
                    package, "run", name=f"outage-{package}", env=environment
                )
                cleanup.callback(process.stop, STOP_TIMEOUT_S)
            if missing := self.await_loaded(self.booked_at_all()):
                raise DevstackError(f"{missing} events had not arrived before the outage")
            yield

    def make_table(self) -> None:
        """Make the table of the old way's platform."""
        with psycopg.connect(self._analytics_url) as connection:
            connection.execute(old_way.TABLE)

    def make_topics(self) -> None:
        """Make the topics in this Kafka."""
        environment = OUTBOX_RELAY | {
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.cluster.bootstrap_servers
        }
        arguments = ("topics", "--replication-factor", "1")
        succeed(
            self.around.program("outbox_relay", *arguments, name="topics", env=environment),
            COMMAND_TIMEOUT_S,
        )

    @property
    def _analytics_url(self) -> str:
        return self.around.stack.environment["ANALYTICS_OWNER_DATABASE_URL"]

    def _received(self) -> set[str]:
        return set(self._ask(RECEIVED, url=self._analytics_url))

    def _through_proxy(self) -> str:
        url = self.around.stack.environment["ANALYTICS_DATABASE_URL"]
        return url.replace(f":{self.around.stack.analytics.port}/", f":{self.analytics.port}/")

    def _ask(self, statement: str, *parameters: Any, url: str = "") -> list[Any]:
        with psycopg.connect(url or self.around.owner_url) as connection:
            return [row[0] for row in connection.execute(statement, parameters)]


def measure(around: Surroundings, results: Results, seconds: int, rounds: int) -> None:
    """Let Kafka go away in three ways, `rounds` times each; then compare the ways."""
    old_way.make_function(around.owner_url)
    with own_outbox(around), _scene(around) as scene:
        hall = make_hall(around.owner_url, _seats_needed(seconds, rounds))
        # First: no event ever tells of what the old ways book.
        with results.tolerating({"section": "kafka", "contender": "all"}):
            _without_kafka(scene, results, hall, seconds, rounds)
        for state in STATES:
            with around.steps.step(f"outbox, platform {state}"):
                labels = {"section": "ways", "contender": OURS, "platform": state}
                results.attempt(labels, lambda s=state: _ours(scene, hall, s, seconds))  # type: ignore[misc]
        for way in (INSIDE, AFTER):
            for state in STATES:
                with around.steps.step(f"{way}, platform {state}"):
                    labels = {"section": "ways", "contender": way, "platform": state}
                    results.attempt(
                        labels,
                        lambda w=way, s=state: _old_way(scene, hall, w, s, seconds),  # type: ignore[misc]
                    )


# ---- ours beside the old way


def _ours(scene: Scene, hall: Hall, state: str, seconds: int) -> Figure:
    with (
        scene.pipeline(scene.kafka.cluster.bootstrap_servers),
        shop(scene.around) as open_shop,
    ):
        known = scene.loaded()
        _break_platform(scene.analytics, state)
        try:
            figure, booked = _loads(scene, open_shop, hall, seconds)
            if state in {DOWN, HANGS}:
                scene.must_lack(booked, f"platform {state}")
        finally:
            scene.analytics.open()
        missing = scene.await_loaded(booked)
        invented = len(scene.loaded() - known - scene.booked_at_all())
        return figure | {"lost": missing, "lost_events": missing, "invented_events": invented}


def _break_platform(proxy: Proxy, state: str) -> None:
    if state == SLOW:
        proxy.slow(SLOW_MS / 1_000)
    elif state == DOWN:
        proxy.cut()
    elif state == HANGS:
        proxy.freeze()


def _old_way(scene: Scene, hall: Hall, way: str, state: str, seconds: int) -> Figure:
    port = free_port()
    environment = {old_way.PORT_VARIABLE: str(port)}
    with ExitStack() as cleanup:
        platform = _platform(scene.around, port, SLOW_MS if state == SLOW else 0)
        cleanup.callback(platform.stop)
        cleanup.callback(platform.resume)
        open_shop = cleanup.enter_context(shop(scene.around, way, env=environment))
        before = scene.received()
        if state == DOWN:
            platform.stop()
        elif state == HANGS:
            platform.pause()
        figure, booked = _loads(scene, open_shop, hall, seconds)
        platform.resume()
        received = scene.received() - before
        return figure | {
            "lost_events": len(booked - received),
            "invented_events": len(received - scene.booked_at_all()),
        }


def _platform(around: Surroundings, port: int, delay_ms: int) -> Process:
    platform = around.program(
        *("benchmarks.old_way", str(port), str(delay_ms)), name=f"platform-{port}"
    )
    platform.wait_ready(lambda: port_answers(port), READY_TIMEOUT_S)
    return platform


def _loads(scene: Scene, open_shop: Shop, hall: Hall, seconds: int) -> tuple[Figure, set[str]]:
    """Measure at a rate, then as many as it takes; return the figure and what was booked."""
    found = scene.stretch(open_shop, hall, RATE, seconds)
    most_s = max(2, seconds // MOST_SHARE)
    most = open_shop.book(hall, at_most=MOST_PER_S * most_s, seconds=most_s, lines=MOST_LINES)
    served = most["answers"].get("201", 0)
    return quantiles([ms / 1_000 for ms in found.latencies_ms]) | {
        "rate": RATE,
        "seconds": seconds,
        "customers": len(found.answers),
        "failed": found.failed,
        "most_per_s": round(served / most["seconds"]),
    }, found.booked


# ---- Kafka away


def _without_kafka(scene: Scene, results: Results, hall: Hall, seconds: int, rounds: int) -> None:
    kinds: dict[str, list[Stretch]] = {name: [] for name in (ABSENT, *FAULTS)}
    missing = dict.fromkeys(FAULTS, 0)
    with shop(scene.around) as open_shop:
        scene.stretch(open_shop, hall, KAFKA_RATE, max(2, seconds // 4))  # warms up
        for number in range(rounds):
            for fault in FAULTS:
                with scene.around.steps.step(f"Kafka {fault}, round {number + 1}"):
                    kinds[ABSENT].append(scene.stretch(open_shop, hall, KAFKA_RATE, seconds))
                    found, missed = _with_fault(scene, open_shop, hall, fault, seconds)
                    kinds[fault].append(found)
                    missing[fault] += missed
    absent_p99 = _pooled(kinds[ABSENT])["p99_ms"]
    for name, stretches in kinds.items():
        figure = _pooled(stretches)
        results.add(
            {"section": "kafka", "contender": name, "rate": KAFKA_RATE}
            | figure
            | {
                "p99_ratio": round(figure["p99_ms"] / absent_p99, 3),
                "customers": sum(len(stretch.answers) for stretch in stretches),
                "failed": sum(stretch.failed for stretch in stretches),
                "lost": missing.get(name, 0),
            }
        )


def _with_fault(
    scene: Scene, open_shop: Shop, hall: Hall, fault: str, seconds: int
) -> tuple[Stretch, int]:
    broker, proxy = scene.kafka.cluster.brokers[0], scene.kafka.proxies[0]
    begin: Callable[[], object]
    end: Callable[[], object]
    begin, end = {
        "frozen": (broker.pause, broker.resume),
        "refusing": (broker.kill, broker.start),
        "black-holed": (proxy.freeze, proxy.open),
    }[fault]
    behind_proxy = fault == "black-holed"
    way = scene.kafka if behind_proxy else scene.kafka.cluster
    with scene.pipeline(way.bootstrap_servers):
        begin()
        try:
            found = scene.stretch(open_shop, hall, KAFKA_RATE, seconds)
            scene.must_lack(found.booked, f"Kafka {fault}")
        finally:
            end()
        return found, scene.await_loaded(found.booked)


def _pooled(stretches: Sequence[Stretch]) -> Figure:
    return quantiles([ms / 1_000 for stretch in stretches for ms in stretch.latencies_ms])


# ---- surroundings


@contextmanager
def _scene(around: Surroundings) -> Iterator[Scene]:
    analytics = around.stack.analytics
    with around.steps.step("the analysts' server, and a Kafka that can be broken"):
        analytics.start()
    try:
        with (
            breakable(around.stack.run, "outage-kafka", 1) as kafka,
            Proxy(lambda: analytics.port) as proxy,
        ):
            scene = Scene(around, kafka, proxy)
            scene.make_topics()
            scene.make_table()
            yield scene
    finally:
        analytics.stop()


def _seats_needed(seconds: int, rounds: int) -> int:
    stretches = len(STATES) * 3
    ways = stretches * (RATE * seconds * 2 + 100 + MOST_PER_S * max(2, seconds // MOST_SHARE))
    kafka = (2 * len(FAULTS) * rounds + 1) * (KAFKA_RATE * seconds * 2 + 100)
    return ways + kafka


def goals(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Yield what bookings have to reach while others are away."""
    for fault in FAULTS:
        found = find(figures, section="kafka", contender=fault)
        ratio = found["p99_ratio"] if found else None
        yield Goal(
            f"booking p99, Kafka {fault}, against {ABSENT}",
            TIMES,
            P99_TIMES_ABSENT,
            ratio,
            at_most=True,
        )
        failed = found["failed"] if found else None
        yield Goal(f"failed bookings, Kafka {fault}", "", 0, failed, at_most=True)
