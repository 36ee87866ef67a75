"""All that is done to the product, and how it is mended: a kind of fault is a context manager.

Entering it strikes, leaving it mends; it yields what was struck. What it decides it decides with
the chances that it is given, so the same seed hits the same parts. Some faults go on striking for
as long as they last.
"""

import json
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import UUID

import psycopg
from confluent_kafka import Consumer, Producer, TopicPartition

from chaos import clocks, disks
from chaos.clocks import Clock
from chaos.gauges import Gauges
from chaos.places import AGAIN, MARK, POISON, RESERVATION_TOPIC
from chaos.product import MAX_CONNECTIONS, Product
from chaos.relay import leader_pid
from chaos.schedule import Nature
from chaos.wiring import How, name_of
from devstack.postgres import PostgresServer
from devstack.processes import DevstackError, wait_until

CONNECT_TIMEOUT_S = 2
JOIN_TIMEOUT_S = 60.0
AWAY_S = 0.2
# Mended by the supervisor alone.
AT_ONCE = (0.0, 0.0)
LATE_COMMIT_S = (0.3, 2.5)
SILENT_S = 0.3
AGAIN_RECORDS = 50
RECENT_TIMEOUT_S = 10.0
SLOW_S, SHORT_CUT_S = 1.0, 0.1
# Clients' tokens outlast the first.
CLOCKS_S = (3_600, -1_800, 120, 0)
CLOCK_JUMPS_EVERY_S = 1.5
# What nobody can load: key and value.
POISONS: tuple[tuple[bytes | None, bytes | None], ...] = (
    (b"poison", b"{"),
    (b"poison", b""),
    (b"poison", None),
    (None, b"null"),
    (b"\xff\xfe", b"\x00\x01\x02"),
    (b"poison", b'{"specversion":"1.0","id":"poison:1","data":{}}'),
    (b"poison", b"[" * 20_000),
    (b"poison", b'{"id":"\\ud800"}'),
)


@dataclass
class Scene:
    """What a fault is given: the product, how far events are, a producer of its own."""

    product: Product
    gauges: Gauges
    producer: Producer

    def alone(self, kind: str, chance: random.Random) -> str:
        """Choose one of the parts of a kind."""
        return chance.choice(self.product.size.names(kind))


Database = Literal["reservations", "analytics"]
OWNERS: Mapping[Database, str] = {
    "reservations": "RESERVATION_OWNER_DATABASE_URL",
    "analytics": "ANALYTICS_OWNER_DATABASE_URL",
}
LEADS_FOR_S, LEADS_AT_MOST_S = 1.0, 8.0
Strike = Callable[[Scene, random.Random], AbstractContextManager[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how long it lasts, what it is about, what it needs."""

    nature: Nature
    strike: Strike
    needs: Callable[[Product], str]


KINDS: dict[str, Kind] = {}


def kind(
    name: str,
    area: str,
    lasts_s: tuple[float, float],
    needs: Callable[[Product], str] = lambda _: "",
) -> Callable[[Strike], Strike]:
    """Add a kind of fault. `needs` says why it can't be done here, or nothing."""

    def add(strike: Strike) -> Strike:
        KINDS[name] = Kind(Nature(lasts_s, area), strike, needs)
        return strike

    return add


def natures() -> Mapping[str, Nature]:
    """What a schedule needs to know."""
    return {name: found.nature for name, found in KINDS.items()}


@contextmanager
def repeated(act: Callable[[], None], every_s: float) -> Iterator[None]:
    """Do something again and again while the block runs; a server may be away meanwhile.

    Raises:
        Exception: what `act` has raised otherwise.
    """
    stop = threading.Event()
    failures: list[Exception] = []

    def repeat() -> None:
        while not stop.is_set():
            try:
                act()
            except psycopg.OperationalError:
                stop.wait(AWAY_S)
            except Exception as error:  # noqa: BLE001 - raised below, where somebody sees it
                failures.append(error)
                return
            stop.wait(every_s)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(JOIN_TIMEOUT_S)
    if failures:
        raise failures[0]


# ---- programs


def _end(scene: Scene, name: str, how: signal.Signals) -> None:
    if not scene.product.part(name).kill(how):
        raise DevstackError(f"{name} didn't run: there was nothing to end")


def _killed(name: str) -> Strike:
    @contextmanager
    def strike(scene: Scene, chance: random.Random) -> Iterator[str]:
        target = scene.alone(name, chance)
        _end(scene, target, signal.SIGKILL)
        yield target

    return strike


def _killed_often(name: str, every_s: float) -> Strike:
    @contextmanager
    def strike(scene: Scene, chance: random.Random) -> Iterator[str]:
        def kill() -> None:
            part = scene.product.part(scene.alone(name, chance))
            if part.alive:
                part.kill()

        with repeated(kill, every_s):
            yield f"all {name}s in turn"

    return strike


def _frozen(name: str) -> Strike:
    @contextmanager
    def strike(scene: Scene, chance: random.Random) -> Iterator[str]:
        target = scene.alone(name, chance)
        with scene.product.part(target).frozen():
            yield target

    return strike


# Both shorter and longer than a frozen leader keeps its lock, a frozen worker its partitions.
for program in ("service", "relay", "worker"):
    kind(f"{program} killed", program, AT_ONCE)(_killed(program))
    kind(f"{program} frozen", program, (1, 14))(_frozen(program))


@kind("leading relay killed often", "relay", (6, 12))
@contextmanager
def _leader_killed_often(scene: Scene, chance: random.Random) -> Iterator[str]:
    """When another one publishes, that one, all being far from Kafka.

    Transactions then take most of the time, so that they are what is struck.
    """
    published = scene.gauges.published.counts
    parts = [scene.product.part(name) for name in scene.product.size.names("relay")]

    def kill() -> None:
        with scene.product.connected(OWNERS["reservations"]) as connection:
            leader = leader_pid(connection)
        for part in parts:
            if part.alive and part.pid == leader:
                until_s, before = time.monotonic() + LEADS_AT_MOST_S, published[-1]
                while published[-1] == before and time.monotonic() < until_s:
                    wait.wait(0.05)
                wait.wait(chance.uniform(0, LEADS_FOR_S))
                part.kill()
                killed.append(part.name)

    killed: list[str] = []
    wait = threading.Event()
    with ExitStack() as far, repeated(kill, 0.1):
        for part in parts:
            far.enter_context(scene.product.ways.broken(part.name, "broker", "slow"))
        yield "whichever leads"
    if not killed:
        raise DevstackError("no relay led")


kind("workers killed often", "worker", (6, 10))(_killed_often("worker", 1.0))


@kind("sweeper killed", "service", AT_ONCE)
@contextmanager
def _sweeper_killed(scene: Scene, _chance: random.Random) -> Iterator[str]:
    _end(scene, "sweeper", signal.SIGKILL)
    yield "sweeper"


@kind("relays upgraded", "relay", (6, 12))
@contextmanager
def _relays_upgraded(scene: Scene, chance: random.Random) -> Iterator[str]:
    """One after the other, in good order, to other settings; behind it back again."""
    other = {
        "OUTBOX_RELAY_CHUNK_MAX_ROWS": str(chance.choice((3, 50))),
        "OUTBOX_RELAY_POLL_INTERVAL_MS": "5",
        "OUTBOX_RELAY_TRANSACTION_TIMEOUT_MS": "3000",
    }
    parts = [scene.product.part(name) for name in scene.product.size.names("relay")]
    for part in parts:
        part.environment |= other
        part.kill(signal.SIGTERM)
    yield "all relays"
    for part in parts:
        for name in other:
            del part.environment[name]
        part.kill(signal.SIGTERM)


def _clock_jumps(name: str) -> Strike:
    """Start it again with a clock that jumps, forward and back; behind it with the right one."""

    @contextmanager
    def strike(scene: Scene, chance: random.Random) -> Iterator[str]:
        target = scene.alone(name, chance)
        part = scene.product.part(target)
        with tempfile.TemporaryDirectory(dir=scene.product.run.path) as folder:
            clock = Clock(Path(folder))
            part.environment |= clock.environment
            part.kill(signal.SIGTERM)
            with repeated(lambda: clock.set(chance.choice(CLOCKS_S)), CLOCK_JUMPS_EVERY_S):
                yield target
            for variable in clock.environment:
                del part.environment[variable]
            part.kill(signal.SIGTERM)

    return strike


for program in ("service", "relay", "worker"):
    kind(f"clock of a {program} jumps", program, (6, 12), lambda _: clocks.why_not())(
        _clock_jumps(program)
    )


# ---- brokers


def _needs_three(product: Product) -> str:
    return "" if product.size.brokers == 3 else "there is one broker"


@kind("broker killed that leads a partition", "kafka", (2, 7))
@contextmanager
def _leader_killed(scene: Scene, chance: random.Random) -> Iterator[str]:
    partition = chance.randrange(6)
    name = name_of(scene.product.kafka.leader_of(RESERVATION_TOPIC, partition))
    with scene.product.part(name).held_down():
        yield f"{name} (partition {partition})"


kind("broker frozen", "kafka", (2, 9))(_frozen("broker"))


@kind("two of three brokers down", "kafka", (4, 12), _needs_three)
@contextmanager
def _two_down(scene: Scene, chance: random.Random) -> Iterator[str]:
    names = sorted(chance.sample(scene.product.size.names("broker"), 2))
    with ExitStack() as down:
        for name in names:
            down.enter_context(scene.product.part(name).held_down())
        yield ", ".join(names)


# ---- Postgres

ROLES = {"reservations": ("reservation_service", "outbox_relay"), "analytics": ("data_platform",)}
SIGNAL_BACKENDS = {
    "end": """
SELECT count(pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity WHERE usename = ANY (%s) ORDER BY random() LIMIT %s
) AS chosen
""",
    "cancel": """
SELECT count(pg_cancel_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity
    WHERE usename = ANY (%s) AND state = 'active' ORDER BY random() LIMIT %s
) AS chosen
""",
}
# Ids of transactions that are taken back and leave no trace in the WAL: a crash gives them again.
BURN_IDS = """
DO $$ BEGIN
    FOR n IN 1..200 LOOP
        BEGIN
            PERFORM pg_current_xact_id();
            RAISE EXCEPTION 'taken back';
        EXCEPTION WHEN raise_exception THEN
        END;
    END LOOP;
END $$
"""


def _server(scene: Scene, name: Database) -> PostgresServer:
    product = scene.product
    return product.reservations if name == "reservations" else product.analytics


def _restarted(name: Database, how: signal.Signals) -> Strike:
    @contextmanager
    def strike(scene: Scene, _chance: random.Random) -> Iterator[str]:
        _end(scene, name, how)
        yield name

    return strike


def _server_frozen(name: Database) -> Strike:
    @contextmanager
    def strike(scene: Scene, _chance: random.Random) -> Iterator[str]:
        with scene.product.part(name).frozen():
            yield name

    return strike


def _backends(name: Database, how: str, at_a_time: int, every_s: float) -> Strike:
    @contextmanager
    def strike(scene: Scene, _chance: random.Random) -> Iterator[str]:
        with psycopg.connect(_server(scene, name).admin_url, autocommit=True) as connection:
            reached = 0

            def signal_some() -> None:
                nonlocal reached
                found = connection.execute(SIGNAL_BACKENDS[how], (list(ROLES[name]), at_a_time))
                reached += (found.fetchone() or (0,))[0]

            with repeated(signal_some, every_s):
                yield name
            if not reached:
                raise DevstackError(f"no backend of {ROLES[name]} was there to {how}")

    return strike


NONE_LEFT = ("too many clients", "connection slots are reserved")


def _exhausted(name: Database) -> Strike:
    """Take every connection that is free, and each that gets free."""

    @contextmanager
    def strike(scene: Scene, _chance: random.Random) -> Iterator[str]:
        url = scene.product.environment[OWNERS[name]]
        with ExitStack() as taken:
            refused = threading.Event()

            def take() -> None:
                for _ in range(MAX_CONNECTIONS):
                    try:
                        one = psycopg.connect(url, connect_timeout=CONNECT_TIMEOUT_S)
                    except psycopg.OperationalError as error:
                        if any(words in str(error) for words in NONE_LEFT):
                            refused.set()
                        raise
                    taken.callback(one.close)

            def end_some() -> None:
                with psycopg.connect(_server(scene, name).admin_url, autocommit=True) as admin:
                    admin.execute(SIGNAL_BACKENDS["end"], (list(ROLES[name]), 8))

            with repeated(take, 0.05), repeated(end_some, 1.0):
                yield name
            if not refused.is_set():
                raise DevstackError("there was always a connection left")

    return strike


def _disk_full(name: str) -> Strike:
    @contextmanager
    def strike(scene: Scene, chance: random.Random) -> Iterator[str]:
        target = scene.alone(name, chance) if name == "broker" else name
        log = scene.product.run.path / f"{target.replace('broker', 'kafka')}.log"
        before = log.stat().st_size
        with scene.product.disks[target].full():
            yield target
        with log.open("rb") as file:
            file.seek(before)
            if b"No space left on device" not in file.read():
                raise DevstackError(f"{target} wrote nothing meanwhile")

    return strike


def _without_disks(product: Product) -> str:
    return disks.why_not() or ("" if product.disks else "this form has no small disks")


for database in OWNERS:
    kind(f"{database}: Postgres shut down at once", database, AT_ONCE)(
        _restarted(database, signal.SIGQUIT)
    )
    kind(f"{database}: Postgres killed", database, AT_ONCE)(_restarted(database, signal.SIGKILL))
    kind(f"{database}: Postgres frozen", database, (1, 9))(_server_frozen(database))
    kind(f"{database}: backends ended", database, (4, 8))(_backends(database, "end", 2, 0.15))
    kind(f"{database}: statements cancelled", database, (4, 8))(
        _backends(database, "cancel", 2, 0.01)
    )
    kind(f"{database}: no connection left", database, (3, 8))(_exhausted(database))
    kind(f"{database}: disk full", database, (3, 8), _without_disks)(_disk_full(database))
kind("Kafka: disk full", "kafka", (3, 8), _without_disks)(_disk_full("broker"))


@kind("analytics: tables locked", "analytics", (3, 8))
@contextmanager
def _tables_locked(scene: Scene, _chance: random.Random) -> Iterator[str]:
    """As an administrator's ALTER TABLE does that waits in turn."""
    with scene.product.connected(OWNERS["analytics"]) as connection, connection.transaction():
        connection.execute("LOCK TABLE analytics.fct_reservations IN ACCESS EXCLUSIVE MODE")
        yield "fct_reservations"


@kind("reservations: Postgres killed amid transactions taken back", "reservations", (4, 7))
@contextmanager
def _killed_amid_rollbacks(scene: Scene, chance: random.Random) -> Iterator[str]:
    """A crash hands the ids out again that it forgot: a cursor that knows them hides new rows."""
    owner = scene.product.environment[OWNERS["reservations"]]

    def burn(burner: psycopg.Connection, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            burner.execute(BURN_IDS)

    def burn_and_crash() -> None:
        with (
            psycopg.connect(owner, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S) as burner,
            ExitStack() as silent,
        ):
            burn(burner, chance.uniform(0.5, 1.0))
            # Each commit of a booking writes down which ids have been handed out.
            for writer in (*scene.product.size.names("service"), "sweeper"):
                silent.enter_context(scene.product.ways.broken(writer, "reservations", "frozen"))
            burn(burner, SILENT_S)
            scene.product.part("reservations").kill()

    # In between the ids that it hands out again are those of bookings.
    with repeated(burn_and_crash, 5.0):
        yield "reservations"


@kind("rows committed late", "data", (4, 8))
@contextmanager
def _late_commits(scene: Scene, chance: random.Random) -> Iterator[str]:
    """Rows whose ids are drawn before those of others that are visible before them.

    What they hold nobody can load, so each must be in the topic, and a dead letter.
    """
    statement = "INSERT INTO outbox (topic, key, payload, headers) VALUES (%s, %s, %s, %s)"
    wait = threading.Event()

    def write() -> None:
        name = str(UUID(int=chance.getrandbits(128)))
        headers, payload = json.dumps({MARK: POISON}), json.dumps({"late": name})
        with scene.product.connected(OWNERS["reservations"]) as owner, owner.transaction():
            owner.execute(statement, (RESERVATION_TOPIC, name, payload, headers))
            wait.wait(chance.uniform(*LATE_COMMIT_S))

    with ExitStack() as writers:
        for _ in range(4):
            writers.enter_context(repeated(write, 0.05))
        yield "4 slow writers"


# ---- the network


@contextmanager
def _broken(scene: Scene, start: str, end: str, how: How) -> Iterator[str]:
    with scene.product.ways.broken(start, end, how):
        yield f"{start} to {end} {how}"


def _way(start: str, end: str) -> Strike:
    """Break the ways of one of the parts of a kind, in one of the ways that networks have."""

    @contextmanager
    def strike(scene: Scene, chance: random.Random) -> Iterator[str]:
        one = scene.alone(start, chance) if start not in {"clients", "PEERS"} else start
        other = scene.alone(end, chance) if end == "service" or start == "PEERS" else end
        how: How = chance.choice(("cut", "frozen", "slow"))
        with _broken(scene, one, other, how) as what:
            yield what

    return strike


for start, end, area, between in (
    ("clients", "service", "service", "clients and a service"),
    ("service", "reservations", "service", "a service and Postgres"),
    ("relay", "reservations", "relay", "a relay and Postgres"),
    ("relay", "broker", "relay", "a relay and Kafka"),
    ("worker", "analytics", "worker", "a worker and Postgres"),
    ("worker", "broker", "worker", "a worker and Kafka"),
    ("PEERS", "broker", "kafka", "a broker and the others"),
):
    kind(f"network between {between}", area, (2, 10))(_way(start, end))


def _flickering(start: str, end: str) -> Strike:
    """Cut the ways of all for a moment, again and again.

    They are slow before, so that there are answers on their way to be lost.
    """

    @contextmanager
    def strike(scene: Scene, _chance: random.Random) -> Iterator[str]:
        names = ["clients"] if start == "clients" else scene.product.size.names(start)
        wait = threading.Event()

        def be(how: How, for_s: float) -> None:
            with ExitStack() as broken:
                for name in names:
                    broken.enter_context(scene.product.ways.broken(name, end, how))
                wait.wait(for_s)

        def flicker() -> None:
            be("slow", SLOW_S)
            be("cut", SHORT_CUT_S)

        with repeated(flicker, 0.0):
            yield f"{start} to {end}"

    return strike


kind("network flickers between clients and services", "service", (5, 9))(
    _flickering("clients", "service")
)
kind("network flickers between relays and Kafka", "relay", (5, 9))(_flickering("relay", "broker"))


# ---- what comes through the topic, and the group


@kind("poisoned records", "data", (2, 5))
@contextmanager
def _poisoned(scene: Scene, chance: random.Random) -> Iterator[str]:
    def poison() -> None:
        key, value = chance.choice(POISONS)
        headers: list[tuple[str, str | bytes | None]] = [(MARK, POISON)]
        scene.producer.produce(RESERVATION_TOPIC, value, key, headers=headers)
        scene.producer.poll(0)

    with repeated(poison, 0.05):
        yield RESERVATION_TOPIC


@kind("records delivered again", "data", (2, 6))
@contextmanager
def _again(scene: Scene, chance: random.Random) -> Iterator[str]:
    """Old ones behind newer ones, as a producer that doesn't know what it has sent does."""

    def repeat() -> None:
        recent = list(scene.gauges.recent)
        for record in chance.sample(recent, min(AGAIN_RECORDS, len(recent))):
            headers: list[tuple[str, str | bytes | None]] = [(MARK, AGAIN)]
            scene.producer.produce(record.topic, record.value, record.key, headers=headers)
        scene.producer.poll(0)

    # Struck right behind a relay or a server that came back, it would have nothing to repeat.
    wait_until(lambda: scene.gauges.recent, RECENT_TIMEOUT_S, "a record to deliver again")
    with repeated(repeat, 0.3):
        yield RESERVATION_TOPIC


@kind("rebalance storm", "worker", (6, 10))
@contextmanager
def _storm(scene: Scene, _chance: random.Random) -> Iterator[str]:
    """A stranger joins the group and leaves it again and again."""

    def join() -> None:
        consumer = Consumer(
            {
                "bootstrap.servers": scene.product.environment["KAFKA_BOOTSTRAP_SERVERS"],
                "group.id": "data-platform",
                "group.protocol": "consumer",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )
        consumer.subscribe([RESERVATION_TOPIC])
        try:
            for _ in range(4):
                consumer.poll(0.3)
                joined.extend(consumer.assignment())
        finally:
            consumer.close()

    joined: list[TopicPartition] = []
    with repeated(join, 0.2):
        yield "the workers' group"
    if not joined:
        raise DevstackError("the group gave the stranger nothing")
