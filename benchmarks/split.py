"""One reservation database, and two with as many events, each with its relay, into one topic.

Each database has a server of its own. All records are read back; a group of workers loads all of
them into one analysts' database, where each event has to be once and each state be the newest.
"""

from benchmarks import drain, events, loader
from benchmarks.place import WAL, Place, load_topic, log_bytes
from benchmarks.processes import cost
from benchmarks.results import Figure, Results
from benchmarks.surroundings import check_alive

SECTION = "scale"
ONE, TWO = "one database", "two databases"
RELAYS = ("scale-one", "scale-two")
WARM_UP_ROWS = 20_000
WORKERS = 2

OUTBOX_BYTES = "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('outbox')"
# Every version from 1 to the newest is there once, and the newest is the state.
WRONG_HISTORIES = """
SELECT count(*) FROM analytics.fct_reservations AS state JOIN (
    SELECT reservation_id, count(*) AS facts, max(version) AS newest
    FROM analytics.fct_reservation_events GROUP BY reservation_id
) AS history USING (reservation_id)
WHERE (state.version, history.newest) IS DISTINCT FROM (history.facts, history.facts)
"""


def measure(one: Place, two: Place, results: Results, rows: int, sizes: Figure) -> None:
    """Publish all rows from one database, then half of as many from each of two; load them all."""
    contender = drain.Contender("one", events.TOPIC, lambda _: one.relay_of("scale-one"))
    warm_up = events.write_backlog(one.owner_url, WARM_UP_ROWS)
    drain.publish(one, contender, warm_up)
    before = one.ask(WAL), one.ask(OUTBOX_BYTES), log_bytes(one.kafka, events.TOPIC)
    with one.steps.step(f"{rows:,} rows from one database"):
        backlog = events.write_backlog(one.owner_url, rows)
        sizes["outbox_wal_bytes"] = round((one.ask(WAL) - before[0]) / rows, 1)
        events.settle(one.admin_url)
        sizes["outbox_bytes"] = round((one.ask(OUTBOX_BYTES) - before[1]) / rows, 1)
        found = drain.publish(one, contender, backlog)
        sizes["log_bytes"] = round((log_bytes(one.kafka, events.TOPIC) - before[2]) / rows, 1)
        results.add({"section": SECTION, "rows": rows, "contender": ONE, "ratio": 1.0} | found)
    speed = found["events_per_s"]
    with one.steps.step(f"{rows:,} rows from two databases"):
        found = _publish_both(one, two, rows)
    with one.steps.step(f"{WORKERS} workers of a group load both"):
        loaded = _load_all(one, rows=warm_up.rows + 2 * rows)
    results.add(
        {"section": SECTION, "rows": rows, "contender": TWO}
        | found
        | loaded
        | {"ratio": round(found["events_per_s"] / speed, 3)}
    )


def _publish_both(one: Place, two: Place, rows: int) -> Figure:
    """Let two relays, one a database, publish half of the rows each at the same time."""
    for there in (one, two):
        events.write_backlog(there.owner_url, rows // 2)
        events.settle(there.admin_url)
    arrivals = one.arrivals(events.TOPIC)
    with one.relay_of("scale-one") as first, two.relay_of("scale-two") as second:
        groups = {"relay 1": first.pid, "relay 2": second.pid}

        def check() -> None:
            check_alive(first)()
            check_alive(second)()

        arrivals.await_first(drain.TIMEOUT_S, check)
        before = cost(groups)
        timeout_s = drain.TIMEOUT_S + rows / drain.SLOWEST_EVENTS_PER_S
        end_s, after = arrivals.watch(rows, timeout_s, check, lambda: cost(groups))
    verdict = arrivals.verify(rows)
    used = sum(after.since(before).values())
    return (
        drain.rates(rows, end_s - verdict.first_append_s)
        | {"cpu_s": used, "cpu_us_per_event": round(used / rows * drain.MICROSECONDS, 2)}
        | verdict.summary()
    )


def _load_all(there: Place, rows: int) -> Figure:
    """Load the events' topic by one group; return what is wrong in the tables."""
    loader.empty(there)
    # A transaction's marker takes an offset, too.
    offsets = sum(there.arrivals(events.TOPIC).ends().values())
    found = load_topic(there, "scale-group", events.TOPIC, offsets, workers=WORKERS)
    with loader.analytics(there) as connection:
        facts, _ = connection.execute(loader.COUNTS).fetchone() or (0, 0)
        (histories,) = connection.execute(WRONG_HISTORIES).fetchone() or (0,)
    return {
        "loaded_events": facts,
        "loaded_per_s": found["events_per_s"],
        "tables_lost": rows - facts,
        "tables_wrong": histories,
        "promised": ("lost", "doubled", "reordered", "tables_lost", "tables_wrong"),
    }
