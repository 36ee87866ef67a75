"""Everybody at their own pace: a burst of bookings, and what batches gain.

`promise buffering`: customers book at a low rate, then come in a burst of many times what a slow
loader manages (its database is a long way off and its batches are small), then at the low rate
again while the loader is behind. Latencies of the three beside each other; `promise buffering
timeline` has what was booked and loaded in each second. When the way is short again it catches up.

`promise batching`: the same relay and worker, told to take so many rows at once.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import psycopg

from benchmarks import events, topic
from benchmarks.loader import analytics, empty, watch_processes
from benchmarks.promise_parts import (
    LOAD_TIMEOUT_S,
    begin_here,
    loaded,
    long_way,
    make_topics,
    named,
    published,
    relay,
    tables_beside_outbox,
    through,
    worker,
)
from benchmarks.results import Figure, Results
from benchmarks.shop import Hall, Shop, make_hall, shop
from benchmarks.surroundings import Surroundings, check_alive
from data_platform.config import Settings as LoaderSettings
from devstack.processes import Process, wait_until
from outbox_relay.config import Settings as RelaySettings

BUFFERING, TIMELINE = "promise buffering", "promise buffering timeline"
BATCHING = "promise batching"
BEFORE, BURST, BEHIND = "before", "in the burst", "while the loader is behind"
# Customers a second, and for how long; in a quick run for a third of it.
LOW_RATE, LOW_S = 5, 40
BURST_RATE, BURST_S = 200, 8
SLOW_LOADER = {"DATA_PLATFORM_BATCH_ROWS": "10"}
SLOW_WAY_S = 0.04
LINES = 500
# By rows at once: so many are published, and loaded; a default takes as many as the largest.
RELAY_ROWS = {1: 1_000, 10: 10_000, 100: 50_000, 1_000: 200_000}
WORKER_ROWS = {1: 500, 10: 5_000, 100: 30_000, 1_000: 100_000, 5_000: 200_000}

BOOKED_AT = "SELECT extract(epoch FROM created_at)::float8 FROM reservations"
LOADED_AT = "SELECT extract(epoch FROM loaded_at)::float8 FROM analytics.fct_reservation_events"


def measure(around: Surroundings, results: Results, *, few: bool) -> None:
    """Measure both."""
    with results.tolerating({"section": BUFFERING, "contender": "all"}):
        _buffer(around, results, few=few)
    with results.tolerating({"section": BATCHING, "contender": "all"}):
        _batch(around, results, few=few)


# ---- a burst


def _buffer(around: Surroundings, results: Results, *, few: bool) -> None:
    begin_here(around)
    share = 3 if few else 1
    low_s, burst_s = LOW_S // share, BURST_S // share
    hall = make_hall(around.owner_url, 4 * LOW_RATE * LOW_S + 3 * BURST_RATE * BURST_S)
    with ExitStack() as cleanup:
        proxy = cleanup.enter_context(long_way(around, SLOW_WAY_S))
        settings = SLOW_LOADER | through(around, proxy)
        open_shop = cleanup.enter_context(shop(around))
        cleanup.enter_context(relay(around))
        loader = cleanup.enter_context(worker(around, settings))
        _load(open_shop, hall, LOW_RATE, 3)  # warms up
        _await_all_loaded(around, loader)
        began = time.time()
        with around.steps.step("a few bookings, the loader keeps up"):
            found = {BEFORE: _load(open_shop, hall, LOW_RATE, low_s)}
        with around.steps.step("a burst of bookings"):
            found[BURST] = _load(open_shop, hall, BURST_RATE, burst_s)
        behind_from = time.time()
        with around.steps.step("a few bookings, the loader is behind"):
            found[BEHIND] = _load(open_shop, hall, LOW_RATE, low_s)
        behind_to = time.time()
        left = _behind(around)
        proxy.open()
        with around.steps.step("the loader's way is short again"):
            _await_all_loaded(around, loader)
    with psycopg.connect(around.owner_url) as ours, analytics(around) as theirs:
        booked = [row[0] for row in ours.execute(BOOKED_AT)]
        seen = [row[0] for row in theirs.execute(LOADED_AT)]
    pace = sum(behind_from <= at < behind_to for at in seen) / (behind_to - behind_from)
    reached = found[BURST]["answers"].get("201", 0) / found[BURST]["seconds"]
    for name, figure in found.items():
        kept = {key: figure[key] for key in ("p50_ms", "p99_ms", "per_s")}
        answers = figure["answers"]
        failed = sum(answers.values()) - answers.get("201", 0)
        results.add({"section": BUFFERING, "contender": name, "failed": failed, **kept})
    results.add(
        {"section": TIMELINE, "contender": "ours"}
        | {"loader_per_s": round(pace, 1), "burst_per_s": round(reached, 1)}
        | {"times": round(reached / pace, 1), "behind": left}
        | {"short_way_at_s": round(behind_to - began)}
        | {"booked": per_second(booked, began), "loaded": per_second(seen, began)}
        | tables_beside_outbox(around)
    )


def per_second(moments: Sequence[float], began: float) -> list[int]:
    """Count what happened in each second from `began` to the last of them."""
    counts = [0] * (int(max(moments, default=began - 1) - began) + 1)
    for at in moments:
        if at >= began:
            counts[int(at - began)] += 1
    return counts


def _load(open_shop: Shop, hall: Hall, rate: float, seconds: float) -> Figure:
    most = round(rate * seconds * 1.5) + 50
    return open_shop.book(hall, at_most=most, rate=rate, seconds=seconds, lines=LINES)


def _await_all_loaded(around: Surroundings, loader: Process) -> None:
    alive = check_alive(loader)

    def all_loaded() -> bool:
        alive()
        return _behind(around) == 0

    wait_until(all_loaded, LOAD_TIMEOUT_S, "the last events")


def _behind(around: Surroundings) -> int:
    with psycopg.connect(around.owner_url) as ours, analytics(around) as theirs:
        return len(ours.execute(BOOKED_AT).fetchall()) - len(theirs.execute(LOADED_AT).fetchall())


# ---- batches


def _batch(around: Surroundings, results: Results, *, few: bool) -> None:
    share = 5 if few else 1
    default = _default(RelaySettings, "outbox_relay_chunk_max_rows")
    for size, rows in _sizes(RELAY_ROWS, default, share).items():
        with around.steps.step(f"a relay that reads {size:,} rows at once"):
            labels = {"section": BATCHING, "contender": "relay", "batch": size}
            results.attempt(labels, lambda s=size, r=rows: _publish(around, s, r))  # type: ignore[misc]
    default = _default(LoaderSettings, "data_platform_batch_rows")
    sizes = _sizes(WORKER_ROWS, default, share)
    name = f"bench-batching-{time.time_ns()}"
    make_topics(around, name)
    topic.fill(around.bootstrap_servers, name, max(sizes.values()))
    for size, rows in sizes.items():
        with around.steps.step(f"a worker that loads {size:,} rows at once"):
            labels = {"section": BATCHING, "contender": "worker", "batch": size}
            results.attempt(labels, lambda s=size, r=rows: _load_topic(around, name, s, r))  # type: ignore[misc]


def _default(settings: type[RelaySettings | LoaderSettings], field: str) -> int:
    return int(settings.model_fields[field].default)


def _sizes(rows: Mapping[int, int], default: int, share: int) -> dict[int, int]:
    """Return how many rows for each batch size; backlogs are made of 200 at least."""
    found = {**rows, default: max(rows.values())}
    return {size: max(200, count // share // 200 * 200) for size, count in found.items()}


def _publish(around: Surroundings, size: int, rows: int) -> Figure:
    arrivals = around.arrivals(events.TOPIC)
    backlog = events.write_backlog(around.owner_url, rows)
    events.settle(around.admin_url)
    with relay(around, env={"OUTBOX_RELAY_CHUNK_MAX_ROWS": str(size)}) as process:
        per_s, verdict = published(arrivals, backlog.rows, process)
    return {"rows": rows, "events_per_s": round(per_s)} | verdict.summary()


def _load_topic(around: Surroundings, name: str, size: int, rows: int) -> Figure:
    empty(around)
    settings = {"DATA_PLATFORM_BATCH_ROWS": str(size), **named(name)}
    with worker(around, settings) as process:
        found = watch_processes(around, [process], lambda c: loaded(c, name), rows)
    return {"rows": rows, "events_per_s": found["events_per_s"]}
