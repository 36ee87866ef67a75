"""The whole product under faults, while clients book: start, break, heal, audit."""

import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import KafkaException, Producer

from chaos import places
from chaos.audit import Difference, audit
from chaos.clients import Clients
from chaos.gauges import Gauges
from chaos.ledger import Ledger
from chaos.product import HOLD_S, Product, Size
from chaos.schedule import Planned
from chaos.strikes import KINDS, Kind, Scene
from devstack.processes import DevstackError, Process, wait_until
from devstack.state import REPOSITORY
from devstack.steps import Steps

# Of all that was broken, until everything is where it belongs.
HEAL_TIMEOUT_S = 150.0
COMMAND_TIMEOUT_S = 120.0
TICK_S = 0.1
PROGRESS_INTERVAL_S = 5.0
FLUSH_TIMEOUT_S = 60.0
# Each may come to nothing: what it needs has not come back yet from what came before.
IN_VAIN = (psycopg.OperationalError, KafkaException, TimeoutError, OSError, DevstackError)
SEATS_PER_BOOKING = 3
HELD = "SELECT count(*) FROM reservations WHERE status = 'held'"


@dataclass(frozen=True)
class Load:
    """What clients do: so many threads, so many behaviours a second in all."""

    threads: int = 12
    rate: float = 40.0


@dataclass
class Struck:
    """A fault that has been. Times are seconds since the first booking.

    `recovered_s` has, by part, how long it took behind the mending until it did what it is for:
    a service answers again; the relay, the workers have done all that was committed at that time.
    """

    kind: str
    target: str
    began_s: float
    ended_s: float
    recovered_s: dict[str, float | None] = field(default_factory=dict)
    in_vain: str = ""


@dataclass
class Outcome:
    """What a run has shown."""

    seed: int
    delivery: str
    seconds: float
    healed_s: float
    struck: list[Struck]
    skipped: dict[str, str]
    figures: dict[str, int]
    ended_by_themselves: dict[str, int]
    differences: list[Difference]
    curves: dict[str, list[tuple[float, int]]]

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return not self.differences


Progress = Callable[[float, str, Gauges, Ledger], None]


def run(
    planned: Sequence[Planned],
    *,
    seconds: float,
    seed: int,
    size: Size,
    load: Load,
    steps: Steps,
    delivery: str = "exactly_once",
    doubles_allowed: bool = False,
    environment: Mapping[str, str] | None = None,
    progress: Progress = lambda *_: None,
    keep_logs: Callable[[Product], None] = lambda _: None,
    heal_timeout_s: float = HEAL_TIMEOUT_S,
) -> Outcome:
    """Start a product, let clients book while faults strike as planned, heal it and audit.

    Raises:
        ConfigurationError, DevstackError, TimeoutError: it could not be started.
    """
    with Product(size, steps, delivery=delivery, environment=environment or {}) as product:
        try:
            product.start()
            return _run(
                product,
                planned,
                seconds=seconds,
                seed=seed,
                load=load,
                steps=steps,
                doubles_allowed=doubles_allowed,
                progress=progress,
                heal_timeout_s=heal_timeout_s,
            )
        finally:
            keep_logs(product)


def _run(
    product: Product,
    planned: Sequence[Planned],
    *,
    seconds: float,
    seed: int,
    load: Load,
    steps: Steps,
    doubles_allowed: bool,
    progress: Progress,
    heal_timeout_s: float,
) -> Outcome:
    environment = product.environment
    ledger = Ledger()
    with steps.step("seats on sale"):
        seats = product.publish_concerts(int(load.rate * seconds * SEATS_PER_BOOKING))
    clients = Clients(
        product.services,
        secret_key=environment["RESERVATION_SECRET_KEY"],
        seats=seats,
        ledger=ledger,
        threads=load.threads,
        rate=load.rate,
        seed=seed,
    )
    gauges = Gauges(
        environment["RESERVATION_OWNER_DATABASE_URL"],
        environment["ANALYTICS_OWNER_DATABASE_URL"],
        environment["KAFKA_BOOTSTRAP_SERVERS"],
    )
    skipped = {name: why for name, kind in KINDS.items() if (why := kind.needs(product))}
    producer = _producer(environment["KAFKA_BOOTSTRAP_SERVERS"])
    late: list[Difference] = []
    with product.supervisor:
        with gauges, clients.booking():
            scene = Scene(product, gauges, producer)
            began_s = time.monotonic()
            faults = _Faults(scene, began_s)
            faults.strike(
                [fault for fault in planned if fault.kind not in skipped],
                seconds,
                lambda now: progress(now, faults.present, gauges, ledger),
            )
            mended_s = time.monotonic()
            with steps.step("everything heals"):
                late += _healed(product, clients, producer, heal_timeout_s)
            healed_s = time.monotonic() - mended_s
            if faults.broken:
                count = len(faults.broken)
                late.append(Difference("a fault that chaos can't strike", count, faults.broken))
            if not any(not struck.in_vain for struck in faults.struck) or not ledger.told:
                late.append(Difference("nothing was struck, or nobody booked", 1, []))
            for struck in faults.struck:
                _measure(struck, product, gauges, ledger, began_s)
        with steps.step("audit"):
            found = places.read(
                environment,
                told=ledger.told,
                unexpected=ledger.unexpected,
                reconcile=_reconcile(product),
            )
            late += audit(found, doubles_allowed=doubles_allowed)
        by_itself = {
            name: part.ended_by_itself
            for name, part in product.supervisor.parts.items()
            if part.ended_by_itself
        }
        late += _ended(product)
    return Outcome(
        seed=seed,
        delivery=product.delivery,
        seconds=round(seconds, 1),
        healed_s=round(healed_s, 1),
        struck=sorted(faults.struck, key=lambda one: one.began_s),
        skipped={fault.kind: skipped[fault.kind] for fault in planned if fault.kind in skipped},
        figures=_figures(found, ledger),
        ended_by_themselves=by_itself,
        differences=late,
        curves={
            name: [
                (round(at - began_s, 2), count)
                for at, count in zip(curve.times_s, curve.counts, strict=False)
            ]
            for name, curve in (
                ("committed", gauges.committed),
                ("published", gauges.published),
                ("loaded", gauges.loaded),
            )
        },
    )


class _Faults:
    """Strikes what is planned when it is planned, each fault in a thread of its own."""

    def __init__(self, scene: Scene, began_s: float) -> None:
        self.struck: list[Struck] = []
        self.broken: list[str] = []
        self._scene = scene
        self._began_s = began_s
        self._present: dict[int, str] = {}
        self._over = threading.Event()

    @property
    def present(self) -> str:
        """What is broken at this moment."""
        return ", ".join(list(self._present.values()))

    def strike(
        self, planned: Sequence[Planned], seconds: float, tick: Callable[[float], None]
    ) -> None:
        """Strike for so many seconds; behind it everything is mended."""
        threads = [
            threading.Thread(target=self._strike, args=(fault,), daemon=True) for fault in planned
        ]
        for thread in threads:
            thread.start()
        told_s = 0.0
        try:
            while (now := time.monotonic() - self._began_s) < seconds:
                self._over.wait(TICK_S)
                if now - told_s >= PROGRESS_INTERVAL_S:
                    told_s = now
                    tick(now)
        finally:
            self._over.set()
            until_s = time.monotonic() + COMMAND_TIMEOUT_S
            for thread, fault in zip(threads, planned, strict=True):
                thread.join(max(0.0, until_s - time.monotonic()))
                if thread.is_alive():
                    self.broken.append(f"{fault.kind}: doesn't end")

    def _strike(self, fault: Planned) -> None:
        kind: Kind = KINDS[fault.kind]
        if self._over.wait(max(0.0, self._began_s + fault.starts_s - time.monotonic())):
            return
        struck = Struck(fault.kind, "", self._now(), 0.0)
        try:
            chance = random.Random(fault.chance)  # noqa: S311 - no secret
            with kind.strike(self._scene, chance) as target:
                struck.target = target
                self._present[fault.number] = f"{fault.kind} ({target})"
                self._over.wait(max(0.0, self._began_s + fault.ends_s - time.monotonic()))
        except IN_VAIN as error:
            struck.in_vain = _in_a_line(error)
        except Exception as error:  # noqa: BLE001 - told by the audit: a fault of chaos itself
            struck.in_vain = _in_a_line(error)
            self.broken.append(f"{fault.kind}: {struck.in_vain}")
        self._present.pop(fault.number, None)
        struck.ended_s = self._now()
        self.struck.append(struck)

    def _now(self) -> float:
        return round(time.monotonic() - self._began_s, 2)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def _producer(bootstrap_servers: str) -> Producer:
    """Return what chaos puts records into topics with: each once, however long it takes."""
    return Producer(
        {
            "bootstrap.servers": bootstrap_servers,
            "enable.idempotence": True,
            "message.timeout.ms": 0,
            "partitioner": "murmur2",
            "linger.ms": 5,
            "log_level": 0,
        }
    )


def _healed(
    product: Product, clients: Clients, producer: Producer, timeout_s: float
) -> Iterator[Difference]:
    """Wait until all parts are well and nothing is on its way; tell what doesn't come to that."""
    service = "RESERVATION_OWNER_DATABASE_URL"

    def no_holds() -> bool:
        with product.connected(service) as connection:
            return connection.execute(HELD).fetchone() == (0,)

    waits: Sequence[tuple[str, Callable[[], object]]] = (
        ("every part is well", lambda: product.wait_well(timeout_s)),
        ("clients have their answers", clients.stop),
        ("what chaos produced is in Kafka", lambda: _flush(producer)),
        ("holds have expired", lambda: wait_until(no_holds, timeout_s + HOLD_S, "expiry")),
        ("all is published", lambda: _no_lag(product, "outbox_relay", timeout_s)),
        ("all is loaded", lambda: _no_lag(product, "data_platform", timeout_s)),
    )
    for what, wait in waits:
        try:
            wait()
        except (*IN_VAIN, RuntimeError, ValueError) as error:
            yield Difference(f"it never comes to this: {what}", 1, [str(error)])


def _flush(producer: Producer) -> None:
    if producer.flush(FLUSH_TIMEOUT_S):
        raise TimeoutError("Kafka doesn't take records")


def _no_lag(product: Product, package: str, timeout_s: float) -> None:
    wait_until(
        lambda: _status(product, package)["lag_rows"] == 0, timeout_s, f"no lag of {package}"
    )


def _status(product: Product, package: str) -> Mapping[str, Any]:
    """What a command says of the state; nothing that is known counts as lag."""
    code, said = _command(product, package, "status", "--json")
    if code:
        return {"lag_rows": None, "said": said[-500:]}
    found: Mapping[str, Any] = json.loads(said)
    return found


def _reconcile(product: Product) -> list[str]:
    code, said = _command(product, "data_platform", "reconcile")
    return said.strip().splitlines()[-20:] if code else []


def _command(product: Product, package: str, *arguments: str) -> tuple[int, str]:
    """Run one of the product's commands to its end; return its code and standard output."""
    output = product.run.path / f"{package}-{arguments[0]}.out"
    output.write_text("", encoding="utf-8")
    name = f"{package}-{arguments[0]}"
    process = Process(
        [sys.executable, "-m", package, *arguments],
        name=name,
        log=product.run.path / f"{name}.log",
        stdout=output,
        env=product.child_environment(),
        cwd=REPOSITORY,
    )
    try:
        code = process.wait(COMMAND_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        raise
    return code, output.read_text(encoding="utf-8")


def keep(logs: Iterable[Path], folder: Path | None) -> None:
    """Copy logs to where they outlive the run."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for log in logs:
            shutil.copy(log, folder)


def _measure(
    struck: Struck, product: Product, gauges: Gauges, ledger: Ledger, began_s: float
) -> None:
    mended_s = began_s + struck.ended_s
    for service in product.services:
        answered_s = ledger.first_answer_after(service, mended_s)
        struck.recovered_s[service] = None if answered_s is None else answered_s - mended_s
    struck.recovered_s["relay"] = gauges.recovered_s(gauges.published, mended_s)
    struck.recovered_s["workers"] = gauges.recovered_s(gauges.loaded, mended_s)
    struck.recovered_s = {
        part: None if took_s is None else round(took_s, 1)
        for part, took_s in struck.recovered_s.items()
    }


def _ended(product: Product) -> Iterator[Difference]:
    """End the programs in good order; tell which of them didn't."""
    bad = [f"{name} with {code}" for name, code in product.end().items() if code]
    if bad:
        yield Difference("a program that SIGTERM doesn't end with 0", len(bad), bad)


def _figures(found: places.Places, ledger: Ledger) -> dict[str, int]:
    marks = [record.mark for record in found.records]
    return {
        "reservations told": len(ledger.told),
        "reservations stored": len(found.stored),
        "answers": sum(ledger.answers.values()),
        "calls repeated": ledger.retries,
        "events in the outbox": len(found.outbox),
        "records in the topics": len(found.records),
        "records delivered again on purpose": marks.count(places.AGAIN),
        "poisoned records": marks.count(places.POISON),
        "facts": len(found.facts),
        "dead letters": len(found.dead_letters),
    }
