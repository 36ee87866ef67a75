"""How fast a topic is loaded, beside what else there is, and how soon a booking is visible.

Everyone loads the same records of one topic, alone, into empty tables. Our worker's clock runs from
its first commit, whose rows don't count, to its last: joining the group is not loading. The others
say themselves how long they took from the first record on.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import psycopg

from benchmarks import events, jdbc_sink, latency, load, quix, topic
from benchmarks.goals import TIMES, Goal
from benchmarks.processes import cost, peak_memory_mib
from benchmarks.results import Figure, Results, find
from benchmarks.surroundings import Surroundings, check_alive, postmaster
from devstack.processes import Process, succeed

TOPIC = "bench-loader"
CATALOGUE = f"{TOPIC}-catalogue"
# The same events' states, as records of a table's columns.
FLAT, WARM_UP = "bench-loader-flat", "bench-loader-warm-up"
WARM_UP_ROWS = 100_000
SINGLE_ROWS = 5_000
SLOWEST_EVENTS_PER_S = 1_000
TIMEOUT_S = 60.0
WATCH_INTERVAL_S = 0.02
LATENCY_RATE = 500
STAR_PER_S = 60_000
VISIBLE_LIMITS_MS = {"p50_ms": 50.0, "p99_ms": 150.0}
MICROSECONDS = 1e6

# Runs with peers are kept apart: beside them everybody may have had fewer events to load.
SECTION, BESIDE = "loader", "loader beside others"

Loaded = Callable[[psycopg.Connection], int]

# Every commit's time, as the reservations' server has it: what latencies lie between.
TRACK = "ALTER SYSTEM SET track_commit_timestamp = on"
EMPTY = """
TRUNCATE analytics.fct_reservation_events, analytics.fct_reservations,
    analytics.fct_reservation_seats, analytics.dim_concerts, analytics.dim_performances,
    analytics.load_offsets
"""
LOADED = "SELECT coalesce(sum(next_offset), 0)::bigint FROM analytics.load_offsets WHERE topic = %s"
COUNTS = """
SELECT (SELECT count(*) FROM analytics.fct_reservation_events),
       (SELECT count(*) FROM analytics.fct_reservations)
"""
# A reservation's version is how many events it had; the states of all their newest ones add up.
STATES = "SELECT coalesce(sum(version), 0)::bigint FROM analytics.fct_reservations"
LAST_COMMIT = """
SELECT extract(epoch FROM clock_timestamp() - max(pg_xact_commit_timestamp(xmin)))::float8
FROM analytics.fct_reservations
"""
VISIBLE = """
SELECT reservation_id, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8
FROM analytics.fct_reservation_events WHERE reservation_id = ANY (%s)
"""
STARS = ("star", "star, two workers")
CURRENT = "current state"
LIMIT = "raw COPY"
JDBC, QUIX = "Debezium's JDBC sink", "Quix Streams' sink"
BATCH, SINGLE = "executemany by 500", "a commit per message"


def measure(
    around: Surroundings, results: Results, rows: int, seconds: int, *, peers: bool = False
) -> None:
    """Load a topic of `rows` events by every contender; then watch single bookings."""
    start_analytics(around)
    around.make_topic(TOPIC)
    around.make_topic(CATALOGUE)
    with around.steps.step(f"a topic of {rows:,} events"):
        filled = topic.fill(around.bootstrap_servers, TOPIC, rows)
    results.sizes = dict(results.sizes) | {"loader_value_bytes": filled.value_bytes}
    section = BESIDE if peers else SECTION
    for name in (LIMIT, STARS[0], STARS[1], CURRENT, BATCH, SINGLE):
        labels = {"section": section, "rows": rows, "contender": name}
        with around.steps.step(f"{rows:,} events: {name}"):
            results.attempt(labels, lambda n=name: _take(around, n, rows))  # type: ignore[misc]
    if peers:
        _measure_peers(around, results, rows)
    labels = {"section": "loader latency", "rate": LATENCY_RATE, "contender": "star"}
    with around.steps.step("commit to visible"):
        results.attempt(labels, lambda: _latency(around, seconds))
    around.stack.analytics.stop()


def _take(around: Surroundings, name: str, rows: int) -> Figure:
    empty(around)
    if name in STARS:
        found = watch(around, ("data_platform", "run"), 1 + STARS.index(name), rows)
        with analytics(around) as connection:
            facts, _ = connection.execute(COUNTS).fetchone() or (0, 0)
        return found | {"lost": rows - facts}
    if name == CURRENT:
        found = watch(around, ("benchmarks.sinks", "current"), 1, rows)
        return found | _lost(around, rows)
    command = {LIMIT: "raw-copy", BATCH: "batch", SINGLE: "single"}[name]
    count = min(rows, SINGLE_ROWS) if name == SINGLE else rows
    process = around.program(
        *("benchmarks.sinks", command, TOPIC, str(count)), name=f"sink-{command}"
    )
    succeed(process, TIMEOUT_S + count / SLOWEST_EVENTS_PER_S)
    told = json.loads(process.log.read_text("utf-8").splitlines()[-1])
    found = _rates(told["rows"], told["seconds"]) | {
        "cpu_us_per_event": round(told["cpu_s"] / told["rows"] * MICROSECONDS, 2),
        # Of the limit that is what it has read before, too.
        "peak_mib": None if name == LIMIT else round(told["peak_mib"], 1),
    }
    return found if name == LIMIT else found | _lost(around, told["rows"])


def _lost(around: Surroundings, rows: int) -> Figure:
    """Count the events that no state tells of; or, below 0, those that it tells of twice."""
    with analytics(around) as connection:
        return {"lost": rows - _states(connection)}


def _measure_peers(around: Surroundings, results: Results, rows: int) -> None:
    """Let others load the same states from flat records, which are less to read than events."""
    with around.steps.step(f"a topic of {rows:,} flat records"):
        for name, count in ((FLAT, rows), (WARM_UP, WARM_UP_ROWS)):
            around.make_topic(name)
            filled = topic.fill(
                *(around.bootstrap_servers, name, count),
                shape=jdbc_sink.flat,
                key_of=jdbc_sink.key_of,
            )
            if name == FLAT:
                results.sizes = dict(results.sizes) | {"loader_flat_bytes": filled.value_bytes}
    for name, take in ((JDBC, _jdbc_sink), (QUIX, _quix)):
        labels = {"section": BESIDE, "rows": rows, "contender": name}
        with around.steps.step(f"{rows:,} records: {name}"):
            results.attempt(labels, lambda t=take: t(around, rows))  # type: ignore[misc]


def _jdbc_sink(around: Surroundings, rows: int) -> Figure:
    found: Figure = {}
    with jdbc_sink.started(around) as connected:
        for name, count in ((WARM_UP, WARM_UP_ROWS), (FLAT, rows)):
            empty(around)
            with jdbc_sink.sink(connected, around, name):
                found = watch_processes(
                    *(around, [connected.process], _states, count),
                    check=partial(jdbc_sink.running, connected, name),
                )
    return found | _lost(around, rows)


def _quix(around: Surroundings, rows: int) -> Figure:
    empty(around)
    with quix.sink(around, FLAT) as process:
        found = watch_processes(around, [process], _states, rows)
    return found | _lost(around, rows)


def _states(connection: psycopg.Connection) -> int:
    """Count the events that the states have seen: a reservation's version is how many it had."""
    found = connection.execute(STATES).fetchone()
    return int(found[0]) if found else 0


def watch(
    around: Surroundings, command: Sequence[str], workers: int, rows: int, topic_name: str = TOPIC
) -> Figure:
    """Return what it costs workers to load a topic of `rows` records."""
    group = f"bench-{time.time()}"
    with ExitStack() as cleanup:
        running = []
        for number in range(workers):
            running.append(_worker(around, command, f"loader-{number}", group, topic_name))
            cleanup.callback(running[-1].stop)
        return watch_processes(around, running, lambda c: _loaded(c, topic_name), rows)


def watch_processes(
    around: Surroundings,
    running: Sequence[Process],
    loaded: Loaded,
    rows: int,
    check: Callable[[], object] = bool,
) -> Figure:
    """Return what it costs processes to load `rows`, from the first commit to the last.

    Args:
        around: the servers.
        running: who loads.
        loaded: counts what is loaded; if by states, the last commit's time is asked for.
        rows: how much there is.
        check: called now and then; raises when it goes wrong.
    """
    groups = around.server_pids()
    groups["postgres"] = postmaster(around.stack.analytics.admin_url)
    groups |= {f"worker {n}": process.pid for n, process in enumerate(running)}
    with analytics(around) as connection:
        readings = _readings(connection, loaded, rows, [check, *map(check_alive, running)])
        first_s, first_rows = next(readings)
        before = cost(groups)
        last_s, last_rows = first_s, first_rows
        for last_s, last_rows in readings:  # noqa: B007 - the last one counts
            pass
        used = cost(groups).since(before)
        if loaded is _states:
            found = connection.execute(LAST_COMMIT).fetchone()
            last_s = time.monotonic() - float(found[0] if found else 0)
        peak_mib = max(peak_memory_mib(process.pid) or 0.0 for process in running)
    counted = last_rows - first_rows
    cpu_s = sum(used[name] for name in used if name.startswith("worker"))
    return _rates(counted, last_s - first_s) | {
        "cpu_us_per_event": round(cpu_s / counted * MICROSECONDS, 2),
        "postgres_us_per_event": round(used["postgres"] / counted * MICROSECONDS, 2),
        "kafka_us_per_event": round(used["kafka"] / counted * MICROSECONDS, 2),
        "peak_mib": peak_mib,
    }


def _worker(
    around: Surroundings, command: Sequence[str], name: str, group: str, topic_name: str
) -> Process:
    environment = {
        "DATA_PLATFORM_RESERVATION_TOPIC": topic_name,
        "DATA_PLATFORM_CATALOGUE_TOPIC": f"{topic_name}-catalogue",
        "DATA_PLATFORM_GROUP": group,
    }
    return around.program(*command, name=name, env=environment)


def _loaded(connection: psycopg.Connection, topic_name: str) -> int:
    found = connection.execute(LOADED, [topic_name]).fetchone()
    return int(found[0]) if found else 0


def _readings(
    connection: psycopg.Connection, count: Loaded, rows: int, checks: Sequence[Callable[[], object]]
) -> Iterator[tuple[float, int]]:
    """Yield (when, rows loaded) at each change, from the first commit to the last."""
    loaded, until = 0, time.monotonic() + TIMEOUT_S + rows / SLOWEST_EVENTS_PER_S
    while loaded < rows:
        asked = time.monotonic()
        found = count(connection)
        now = time.monotonic()
        if found > loaded:
            loaded = found
            yield now, loaded
        for check in checks:
            check()
        if now > until:
            raise TimeoutError(f"{loaded:,} of {rows:,} events were loaded in time")
        # A count of a large table must not cost what is measured: a fortieth of one core at most.
        time.sleep(max(WATCH_INTERVAL_S, 40 * (now - asked)))


def _latency(around: Surroundings, seconds: int) -> Figure:
    """Book single seats through relay and worker; count from commit to commit."""
    empty(around)
    with around.relay("exactly_once"), ExitStack() as cleanup:
        worker = around.program("data_platform", "run", name="loader-latency")
        cleanup.callback(worker.stop)
        # Whatever other sections have left in the topic comes first.
        events.write_backlog(around.owner_url, latency.WARM_UP_ROWS)
        newest = events.write_one(around.owner_url)
        _await_visible(around, [newest])
        after_id = events.last_id(around.owner_url)
        writers = load.start(
            around, load.SINGLE, clients=latency.CLIENTS, seconds=seconds, rate=LATENCY_RATE
        )
        written_per_s = writers.finish()
        committed = latency.commit_times(around, after_id)
        visible = _await_visible(around, list(committed))
    latencies_s = [visible[key] - at for key, at in committed.items()]
    return latency.quantiles(latencies_s) | {
        "seconds": seconds,
        "written_per_s": round(written_per_s),
    }


def _await_visible(around: Surroundings, keys: Sequence[bytes]) -> dict[bytes, float]:
    names = [key.decode() for key in keys]
    until = time.monotonic() + latency.CATCH_UP_TIMEOUT_S
    found: dict[bytes, float] = {}
    with analytics(around) as connection:
        while time.monotonic() < until:
            found = {name.encode(): at for name, at in connection.execute(VISIBLE, [names])}
            if len(found) == len(names):
                return found
            time.sleep(latency.POLL_S)
    raise TimeoutError(f"{len(names) - len(found)} of {len(names)} bookings did not become visible")


def start_analytics(around: Surroundings) -> None:
    """Start the analysts' server, which the other sections have no use for."""
    server = around.stack.analytics
    server.start()
    with psycopg.connect(server.admin_url, autocommit=True) as connection:
        connection.execute(TRACK)
    server.stop()
    server.start()


def empty(around: Surroundings) -> None:
    """Empty the analysts' tables."""
    with analytics(around) as connection:
        connection.execute(EMPTY)
    with psycopg.connect(around.stack.analytics.admin_url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")


def analytics(around: Surroundings) -> psycopg.Connection:
    """Connect to the analysts' database as its owner."""
    return psycopg.connect(
        around.stack.environment["ANALYTICS_OWNER_DATABASE_URL"], autocommit=True
    )


def _rates(rows: int, seconds: float) -> Figure:
    return {
        "seconds": round(seconds, 3),
        "events_per_s": round(rows / seconds),
        "us_per_event": round(seconds / rows * MICROSECONDS, 2),
    }


def goals(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Yield what the loader has to reach."""
    speeds: dict[str, dict[str, float]] = {SECTION: {}, BESIDE: {}}
    for figure in figures:
        if figure["section"] in speeds and not figure.get("error"):
            speeds[figure["section"]][figure["contender"]] = figure["events_per_s"]
    alone = speeds[SECTION].get(STARS[0])
    yield Goal("loader, the whole star, one worker", "events/s", STAR_PER_S, alone)
    for ours, other, wanted in (
        (STARS[0], LIMIT, 0.4),
        (STARS[1], STARS[0], 1.3),
        (CURRENT, JDBC, 1.5),
        (CURRENT, BATCH, 1.5),
        (CURRENT, QUIX, 3.0),
        (CURRENT, SINGLE, 40.0),
    ):
        within = [run for run in speeds.values() if ours in run and other in run]
        found = round(within[0][ours] / within[0][other], 2) if within else None
        yield Goal(f"loader, {ours} against {other}", TIMES, wanted, found)
    seen = find(figures, section="loader latency", rate=LATENCY_RATE)
    for quantile, limit in VISIBLE_LIMITS_MS.items():
        what = f"booking to analyst {quantile[:3]} at {LATENCY_RATE}/s"
        yield Goal(what, "ms", limit, seen[quantile] if seen else None, at_most=True)
