"""How long `reconcile` and `rebuild` take, and how much memory, by the number of events.

The events come through Kafka and a worker, as in life; the reservations that they tell of are put
into the service's database from the tables, so that both sides are equal: nothing may be found.
"""

import json
import time

import psycopg

from benchmarks import loader, topic
from benchmarks.processes import cost, peak_memory_mib
from benchmarks.results import Figure, Results
from benchmarks.surroundings import Surroundings
from devstack.processes import DevstackError

TOPIC = "bench-reconcile"
CATALOGUE = "bench-reconcile-catalogue"
TIMEOUT_S = 120.0
SLOWEST_EVENTS_PER_S = 2_000
WATCH_INTERVAL_S = 0.1

# The catalogue says nothing here: what reservations tell of is taken for what it would say.
KNOWN = """
UPDATE analytics.dim_concerts SET version = 1, currency = 'EUR', occurred_at = now();
UPDATE analytics.dim_performances SET version = 1, sales_open_at = '2026-01-01Z',
    sales_close_at = '2030-01-01Z', status = 'scheduled', capacity = 1000, occurred_at = now();
"""
EMPTY = "TRUNCATE reservations, reservation_seats, seats, performances, concerts"
# (read from the tables, write into the service's)
COPIES = (
    (
        """
        COPY (SELECT concert_id, title, venue, time_zone, currency, version
              FROM analytics.dim_concerts) TO STDOUT
        """,
        "COPY concerts (concert_id, title, venue, time_zone, currency, version) FROM STDIN",
    ),
    (
        """
        COPY (SELECT performance_id, concert_id, starts_at, sales_open_at, sales_close_at, status,
                  capacity FROM analytics.dim_performances) TO STDOUT
        """,
        """
        COPY performances (performance_id, concert_id, starts_at, sales_open_at, sales_close_at,
            status, capacity) FROM STDIN
        """,
    ),
    (
        """
        COPY (SELECT reservation_id, customer_id, performance_id, status, version, amount,
                  currency, created_at, updated_at, expires_at
              FROM analytics.fct_reservations) TO STDOUT
        """,
        "COPY reservations FROM STDIN",
    ),
    (
        """
        COPY (SELECT reservation_id, seat_id, section, "row", number, price
              FROM analytics.fct_reservation_seats) TO STDOUT
        """,
        "COPY reservation_seats FROM STDIN",
    ),
)
DAMAGE = """
DELETE FROM analytics.fct_reservation_events
WHERE reservation_id = (SELECT min(reservation_id) FROM analytics.fct_reservations);
UPDATE analytics.fct_reservations SET amount = amount + 1
WHERE reservation_id = (SELECT max(reservation_id) FROM analytics.fct_reservations);
"""
SETTLE = "VACUUM (ANALYZE) reservations, reservation_seats"


def measure(around: Surroundings, results: Results, rows: int) -> None:
    """Fill everything with `rows` events, reconcile, damage a row, reconcile, rebuild."""
    around.stack.analytics.start()
    around.make_topic(TOPIC)
    around.make_topic(CATALOGUE)
    with around.steps.step(f"{rows:,} events, loaded"):
        topic.fill(around.bootstrap_servers, TOPIC, rows)
        _load(around, rows)
    with around.steps.step("the same in the service"):
        _mirror(around)
    for name in ("reconcile", "rebuild"):
        labels = {"section": "reconcile", "rows": rows, "contender": name}
        with around.steps.step(f"{name} of {rows:,} events"):
            results.attempt(labels, lambda n=name: _take(around, n, rows))  # type: ignore[misc]
        print(json.dumps(results.figures[-1]))
    around.stack.analytics.stop()


def _analytics_url(around: Surroundings) -> str:
    return around.stack.environment["ANALYTICS_OWNER_DATABASE_URL"]


def _environment() -> dict[str, str]:
    return {
        "DATA_PLATFORM_RESERVATION_TOPIC": TOPIC,
        "DATA_PLATFORM_CATALOGUE_TOPIC": CATALOGUE,
        "DATA_PLATFORM_GROUP": TOPIC,
    }


def _load(around: Surroundings, rows: int) -> None:
    process = around.program("data_platform", "run", name="reconcile-worker", env=_environment())
    until = time.monotonic() + TIMEOUT_S + rows / SLOWEST_EVENTS_PER_S
    with psycopg.connect(_analytics_url(around), autocommit=True) as connection:
        while (connection.execute(loader.LOADED, [TOPIC]).fetchone() or (0,))[0] < rows:
            if not process.alive or time.monotonic() > until:
                raise DevstackError(f"the worker doesn't load\n{process.log_tail()}")
            time.sleep(WATCH_INTERVAL_S)
    process.stop()


def _mirror(around: Surroundings) -> None:
    with (
        psycopg.connect(_analytics_url(around)) as tables,
        psycopg.connect(around.owner_url) as service,
    ):
        tables.execute(KNOWN)
        service.execute(EMPTY)
        for read, write in COPIES:
            with (
                tables.cursor() as source,
                service.cursor() as target,
                source.copy(read) as out,
                target.copy(write) as into,
            ):
                for block in out:
                    into.write(block)
        service.commit()
        service.autocommit = True
        service.execute(SETTLE)


def _take(around: Surroundings, name: str, rows: int) -> Figure:
    """Run the command to its end and watch what it needs."""
    if name == "rebuild":
        with psycopg.connect(_analytics_url(around)) as connection:
            connection.execute(DAMAGE)
    process = around.program(
        "data_platform", name, "--json", name=f"bench-{name}", env=_environment()
    )
    began_at, peak_mib = time.monotonic(), 0.0
    used = before = cost({"command": process.pid})
    until = began_at + TIMEOUT_S + rows / SLOWEST_EVENTS_PER_S
    while process.alive:
        if time.monotonic() > until:
            process.stop()
            raise DevstackError(f"{name} took longer than {until - began_at:.0f} s")
        peak_mib = max(peak_mib, peak_memory_mib(process.pid) or 0.0)
        now = cost({"command": process.pid})
        used = now if now.cpu_s["command"] else used
        time.sleep(WATCH_INTERVAL_S)
    seconds = time.monotonic() - began_at
    if process.exit_code:
        raise DevstackError(f"{name} ended with {process.exit_code}\n{process.log_tail()}")
    told = json.loads(process.log.read_text("utf-8").splitlines()[-1])
    return {
        "seconds": round(seconds, 1),
        "events_per_s": round(rows / seconds),
        "peak_mib": peak_mib,
        "command_cpu_s": used.since(before)["command"],
        "locked_s": told.get("locked_s"),
        "differences": told.get("found", len(told["differences"])),
        "compared": told.get("compared"),
    }
