"""How fast a topic is loaded, beside what else there is, and how soon a booking is visible.

Everyone loads the same records of one topic, alone, into empty tables. Our worker's clock runs from
its first commit, whose rows don't count, to its last: joining the group is not loading. The others
say themselves how long they took from the first record on.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psycopg

from benchmarks import events, latency, load, topic
from benchmarks.goals import TIMES, Goal
from benchmarks.processes import cost, peak_memory_mib
from benchmarks.results import Figure, Results, find
from benchmarks.surroundings import POSTMASTER, Surroundings, check_alive
from devstack.processes import Process, succeed

TOPIC = "bench-loader"
CATALOGUE = "bench-loader-catalogue"
SINGLE_ROWS = 5_000
SLOWEST_EVENTS_PER_S = 100
TIMEOUT_S = 60.0
WATCH_INTERVAL_S = 0.02
LATENCY_RATE = 500
STAR_PER_S = 60_000
VISIBLE_LIMITS_MS = {"p50_ms": 50.0, "p99_ms": 150.0}
MICROSECONDS = 1e6

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
VISIBLE = """
SELECT reservation_id, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8
FROM analytics.fct_reservation_events WHERE reservation_id = ANY (%s)
"""
STARS = ("star", "star, two workers")
CURRENT = "current state"
LIMIT = "raw COPY"
BATCH, SINGLE = "executemany by 500", "a commit per message"


def measure(around: Surroundings, results: Results, rows: int, seconds: int) -> None:
    """Load a topic of `rows` events by every contender; then watch single bookings."""
    _start_analytics(around)
    around.make_topic(TOPIC)
    around.make_topic(CATALOGUE)
    with around.steps.step(f"a topic of {rows:,} events"):
        filled = topic.fill(around.bootstrap_servers, TOPIC, rows)
    results.sizes = dict(results.sizes) | {"loader_value_bytes": filled.value_bytes}
    for name in (LIMIT, STARS[0], STARS[1], CURRENT, BATCH, SINGLE):
        labels = {"section": "loader", "rows": rows, "contender": name}
        with around.steps.step(f"{rows:,} events: {name}"):
            results.attempt(labels, lambda n=name: _take(around, n, rows))  # type: ignore[misc]
    labels = {"section": "loader latency", "rate": LATENCY_RATE, "contender": "star"}
    with around.steps.step("commit to visible"):
        results.attempt(labels, lambda: _latency(around, seconds))
    around.stack.analytics.stop()


def _take(around: Surroundings, name: str, rows: int) -> Figure:
    _empty(around)
    if name in STARS:
        found = _watch(around, ("data_platform", "run"), 1 + STARS.index(name), rows)
        with _analytics(around) as connection:
            facts, _ = connection.execute(COUNTS).fetchone() or (0, 0)
        return found | {"lost": rows - facts}
    if name == CURRENT:
        return _watch(around, ("benchmarks.sinks", "current"), 1, rows)
    command = {LIMIT: "raw-copy", BATCH: "batch", SINGLE: "single"}[name]
    count = min(rows, SINGLE_ROWS) if name == SINGLE else rows
    process = around.program(
        *("benchmarks.sinks", command, TOPIC, str(count)), name=f"sink-{command}"
    )
    succeed(process, TIMEOUT_S + count / SLOWEST_EVENTS_PER_S)
    told = json.loads(process.log.read_text("utf-8").splitlines()[-1])
    return _rates(told["rows"], told["seconds"])


def _watch(around: Surroundings, command: Sequence[str], workers: int, rows: int) -> Figure:
    groups = {
        "postgres": _postmaster(around),
        "kafka": around.server_pids()["kafka"],
    }
    group = f"bench-{time.time()}"
    with ExitStack() as cleanup, _analytics(around) as connection:
        running = [_worker(around, command, f"loader-{n}", group) for n in range(workers)]
        for process in running:
            cleanup.callback(process.stop)
        groups |= {f"worker {n}": process.pid for n, process in enumerate(running)}
        readings = _readings(connection, rows, running)
        first_s, first_rows = next(readings)
        before = cost(groups)
        last_s, last_rows = first_s, first_rows
        for last_s, last_rows in readings:  # noqa: B007 - the last one counts
            pass
        used = cost(groups).since(before)
        peak_mib = max(peak_memory_mib(process.pid) or 0.0 for process in running)
    counted = last_rows - first_rows
    cpu_s = sum(used[name] for name in used if name.startswith("worker"))
    return _rates(counted, last_s - first_s) | {
        "cpu_us_per_event": round(cpu_s / counted * MICROSECONDS, 2),
        "postgres_us_per_event": round(used["postgres"] / counted * MICROSECONDS, 2),
        "kafka_us_per_event": round(used["kafka"] / counted * MICROSECONDS, 2),
        "peak_mib": peak_mib,
    }


def _worker(around: Surroundings, command: Sequence[str], name: str, group: str) -> Process:
    environment = {
        "DATA_PLATFORM_RESERVATION_TOPIC": TOPIC,
        "DATA_PLATFORM_CATALOGUE_TOPIC": CATALOGUE,
        "DATA_PLATFORM_GROUP": group,
    }
    return around.program(*command, name=name, env=environment)


def _readings(
    connection: psycopg.Connection, rows: int, running: Sequence[Process]
) -> Iterator[tuple[float, int]]:
    """Yield (when, rows loaded) at each change, from the first commit to the last."""
    loaded, until = 0, time.monotonic() + TIMEOUT_S + rows / SLOWEST_EVENTS_PER_S
    checks = [check_alive(process) for process in running]
    while loaded < rows:
        found = connection.execute(LOADED, [TOPIC]).fetchone()
        now = time.monotonic()
        if found and found[0] > loaded:
            loaded = found[0]
            yield now, loaded
        for check in checks:
            check()
        if now > until:
            raise TimeoutError(f"{loaded:,} of {rows:,} events were loaded in time")
        time.sleep(WATCH_INTERVAL_S)


def _latency(around: Surroundings, seconds: int) -> Figure:
    """Book single seats through relay and worker; count from commit to commit."""
    _empty(around)
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
    with _analytics(around) as connection:
        while time.monotonic() < until:
            found = {name.encode(): at for name, at in connection.execute(VISIBLE, [names])}
            if len(found) == len(names):
                return found
            time.sleep(latency.POLL_S)
    raise TimeoutError(f"{len(names) - len(found)} of {len(names)} bookings did not become visible")


def _start_analytics(around: Surroundings) -> None:
    """Start the analysts' server, which the other sections have no use for."""
    server = around.stack.analytics
    server.start()
    with psycopg.connect(server.admin_url, autocommit=True) as connection:
        connection.execute(TRACK)
    server.stop()
    server.start()


def _empty(around: Surroundings) -> None:
    with _analytics(around) as connection:
        connection.execute(EMPTY)
    with psycopg.connect(around.stack.analytics.admin_url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")


def _analytics(around: Surroundings) -> psycopg.Connection:
    return psycopg.connect(
        around.stack.environment["ANALYTICS_OWNER_DATABASE_URL"], autocommit=True
    )


def _postmaster(around: Surroundings) -> int:
    with psycopg.connect(around.stack.analytics.admin_url) as connection:
        found = connection.execute(POSTMASTER).fetchone()
    pid = Path(str(found[0] if found else "")) / "postmaster.pid"
    return int(pid.read_text(encoding="ascii").split()[0])


def _rates(rows: int, seconds: float) -> Figure:
    return {
        "seconds": round(seconds, 3),
        "events_per_s": round(rows / seconds),
        "us_per_event": round(seconds / rows * MICROSECONDS, 2),
    }


def goals(figures: Sequence[Figure]) -> Iterator[Goal]:
    """Yield what the loader has to reach."""
    speeds = {
        figure["contender"]: figure["events_per_s"]
        for figure in figures
        if figure["section"] == "loader" and not figure.get("error")
    }
    yield Goal("loader, the whole star, one worker", "events/s", STAR_PER_S, speeds.get(STARS[0]))
    for ours, other, wanted in (
        (STARS[0], LIMIT, 0.4),
        (STARS[1], STARS[0], 1.3),
        (CURRENT, BATCH, 1.5),
        (CURRENT, SINGLE, 40.0),
    ):
        known = ours in speeds and other in speeds
        found = round(speeds[ours] / speeds[other], 2) if known else None
        yield Goal(f"loader, {ours} against {other}", TIMES, wanted, found)
    seen = find(figures, section="loader latency", rate=LATENCY_RATE)
    for quantile, limit in VISIBLE_LIMITS_MS.items():
        what = f"booking to analyst {quantile[:3]} at {LATENCY_RATE}/s"
        yield Goal(what, "ms", limit, seen[quantile] if seen else None, at_most=True)
