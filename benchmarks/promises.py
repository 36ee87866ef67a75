"""What the pattern promises, as figures: here, and in `promise_pace`, `_group`, `_failover`.

Here: an hour's events while the platform is down, and publishers killed amid their transactions.
What is in the topic is followed version by version (`arrivals.Verdict`); the analysts' tables are
compared with the outbox by reservation and version, not only counted. `promise order` tells how
many keys and records were followed so.
"""

import random
import time

from confluent_kafka import IsolationLevel

from benchmarks import events, faults, promise_failover, promise_group, promise_pace
from benchmarks.arrivals import Arrivals, Reader, Verdict
from benchmarks.loader import start_analytics
from benchmarks.promise_parts import (
    FIRST_TIMEOUT_S,
    ORDER,
    SLOWEST_EVENTS_PER_S,
    await_loaded,
    begin_here,
    note_order,
    published,
    relay,
    tables_beside_outbox,
    worker,
)
from benchmarks.results import WRONG, Figure, Results
from benchmarks.shop import own_outbox
from benchmarks.surroundings import Surroundings
from devstack.processes import wait_until

TOLERANCE, EXACTLY = "promise tolerance", "promise exactly once"
BOOKINGS_PER_S = 300
HOUR_EVENTS = BOOKINGS_PER_S * 3_600
KILL_ROWS, FEW_KILL_ROWS = 200_000, 20_000
KILLS, FEW_KILLS = 6, 3
# Small, so that a kill meets one of many transactions and not the only one.
KILL_CHUNK_ROWS = 500
KILL_AFTER_S = (0.05, 0.5)
SETTLE_TIMEOUT_S = 60.0
STRUCK, STRUCK_S = "transactions overlap; relay, Kafka and Postgres struck", 20
PROMISED = (*WRONG, "invented")


def measure(around: Surroundings, results: Results, rows: int, rounds: int) -> None:
    """Measure every promise: `rows` events while the platform is down, `rounds` of each strike."""
    few = rounds == 1
    start_analytics(around)
    try:
        with own_outbox(around):
            results.attempt(
                {"section": TOLERANCE, "contender": "ours", "promised": PROMISED},
                lambda: _tolerate(around, results, rows),
            )
        for delivery in ("exactly_once", "at_least_once"):
            labels = {"section": EXACTLY, "contender": delivery, "promised": PROMISED}
            with own_outbox(around), around.steps.step(f"{delivery}, killed amid transactions"):
                results.attempt(
                    labels,
                    lambda d=delivery: _kill_publisher(around, results, d, few=few),  # type: ignore[misc]
                )
        with own_outbox(around):
            promise_pace.measure(around, results, few=few)
            promise_group.measure(around, results, rounds)
        labels = {"section": ORDER, "contender": STRUCK, "promised": PROMISED}
        with own_outbox(around), around.steps.step(STRUCK):
            results.attempt(labels, lambda: faults.order(around, STRUCK_S * rounds))
        with own_outbox(around):
            promise_failover.measure(around, results, rounds)
    finally:
        around.stack.analytics.stop()


# ---- the platform is down for an hour


def _tolerate(around: Surroundings, results: Results, rows: int) -> Figure:
    arrivals = begin_here(around)
    server = around.stack.analytics
    server.stop()
    try:
        with around.steps.step(f"{rows:,} events committed and published, the platform down"):
            began = time.monotonic()
            backlog = events.write_backlog(around.owner_url, rows)
            written_s = time.monotonic() - began
            events.settle(around.admin_url)
            with relay(around) as process:
                published_per_s, verdict = published(arrivals, backlog.rows, process)
        note_order(results, "platform down for an hour's events", verdict)
    finally:
        came_up = time.monotonic()
        server.start()
    with around.steps.step("the platform is back, and catches up"), worker(around) as process:
        first, last = await_loaded(around, arrivals, backlog.rows, process)
    with around.steps.step("outbox and tables compared"):
        compared = tables_beside_outbox(around)
    return {
        "hours": round(backlog.rows / BOOKINGS_PER_S / 3_600, 3),
        "written_per_s": round(backlog.rows / written_s),
        "published_per_s": round(published_per_s),
        "caught_up_s": round(last - came_up, 1),
        "loaded_per_s": round(backlog.rows / (last - first)),
        **compared,
    }


# ---- the publisher is killed amid its transactions


def _kill_publisher(around: Surroundings, results: Results, delivery: str, *, few: bool) -> Figure:
    arrivals = begin_here(around)
    rows, kills = (FEW_KILL_ROWS, FEW_KILLS) if few else (KILL_ROWS, KILLS)
    backlog = events.write_backlog(around.owner_url, rows)
    events.settle(around.admin_url)
    chance = random.Random(kills)  # noqa: S311 - the same moments each time
    settings = {"OUTBOX_RELAY_CHUNK_MAX_ROWS": str(KILL_CHUNK_ROWS)}
    struck = 0
    for _ in range(kills):
        if arrivals.verify(backlog.rows).lost == 0:
            break
        before = arrivals.ends(IsolationLevel.READ_UNCOMMITTED)
        with relay(around, delivery, settings) as process:
            wait_until(
                lambda b=before: arrivals.ends(IsolationLevel.READ_UNCOMMITTED) != b,  # type: ignore[misc]
                *(FIRST_TIMEOUT_S, "records"),
            )
            time.sleep(chance.uniform(*KILL_AFTER_S))
            process.kill()
            struck += 1
    with relay(around, delivery, settings) as process:
        verdict = _settled(arrivals, backlog.rows)
    if delivery == "exactly_once":
        note_order(results, f"relay killed {struck} times amid transactions", verdict)
    with worker(around) as process:
        await_loaded(around, arrivals, backlog.rows, process)
    return {
        "kills": struck,
        # Of transactions that never committed: written, and seen by nobody.
        "aborted": _uncommitted(around, arrivals) - verdict.records,
        "repeated": verdict.doubled,
        **tables_beside_outbox(around),
    }


def _settled(arrivals: Arrivals, rows: int) -> Verdict:
    """Wait until all is in the topic and no more comes; what was aborted has offsets, too."""
    until = time.monotonic() + SETTLE_TIMEOUT_S + rows / SLOWEST_EVENTS_PER_S
    seen, verdict = -1, arrivals.verify(rows)
    while (verdict.lost or verdict.records != seen) and time.monotonic() < until:
        seen = verdict.records
        time.sleep(1.0)
        verdict = arrivals.verify(rows)
    return verdict


def _uncommitted(around: Surroundings, arrivals: Arrivals) -> int:
    """Count the records that are in the topic, committed or not."""
    with Reader(
        *(around.bootstrap_servers, arrivals.topic, arrivals.begin), isolation="read_uncommitted"
    ) as reader:
        return sum(1 for _ in reader.until_end())
