"""Whatever is delivered, twice, out of order, to workers that die: the tables say what happened."""

import random
import signal
import time

import psycopg

from tests.data_platform.conftest import Platform
from tests.data_platform.histories import event, expected_facts, expected_states, history
from tests.waiting import wait_until

COUNT = "SELECT count(*) FROM analytics.fct_reservation_events"
WAITING_LOADER = """
SELECT pid FROM pg_stat_activity
WHERE application_name = 'data-platform' AND wait_event_type = 'Lock'
    AND datname = current_database()
"""


def test_killed_workers_doubled_and_shuffled_events_leave_the_tables_equal_to_the_reservations(
    platform: Platform,
) -> None:
    events = history(6_000, seed=7)
    dice = random.Random(7)  # noqa: S311 - the same order and victims each time
    first, second = events[:], events[:]
    dice.shuffle(first)
    dice.shuffle(second)
    platform.produce(first)
    # The second delivery goes anywhere, as after a change of the number of partitions: two
    # workers meet in one key.
    for partition in range(6):
        platform.produce_raw(((e.key, e.value) for e in second[partition::6]), partition)
    total = 2 * len(events)

    workers = [platform.worker(DATA_PLATFORM_BATCH_ROWS="200") for _ in range(3)]
    for eighth in range(1, 8):
        platform.wait_for_offsets(eighth * total // 8)
        victim = dice.randrange(3)
        assert workers[victim].kill() == -signal.SIGKILL
        workers[victim] = platform.worker(DATA_PLATFORM_BATCH_ROWS="200")
    platform.wait_for_offsets(total)

    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)
    assert platform.dead_letters() == []


def test_partitions_that_move_to_new_workers_and_back_are_loaded_once(platform: Platform) -> None:
    events = history(4_000, seed=11)
    platform.produce(events)
    first = platform.worker(DATA_PLATFORM_BATCH_ROWS="100")
    platform.wait_for_offsets(1)
    second = platform.worker(DATA_PLATFORM_BATCH_ROWS="100")
    wait_until(lambda: "partitions_placed" in second.log.read_text(), 30, "a share for the second")
    third = platform.worker(DATA_PLATFORM_BATCH_ROWS="100")
    wait_until(lambda: "partitions_placed" in third.log.read_text(), 30, "a share for the third")
    assert second.stop() == 0
    assert first.stop() == 0
    platform.produce(more := history(200, seed=12))
    platform.wait_for_offsets(len(events) + len(more))

    assert platform.facts() == expected_facts(events + more)
    assert platform.states() == expected_states(events + more)


def test_a_worker_killed_inside_its_transaction_leaves_nothing_half_done(
    platform: Platform,
) -> None:
    events = history(50, seed=3)
    worker = platform.worker()
    wait_until(lambda: platform.rows("SELECT FROM analytics.load_offsets"), 30, "placement")
    with (
        psycopg.connect(platform.database.owner_url) as holder,
        # Only the same role sees what a session waits for.
        psycopg.connect(platform.database.loader_url, autocommit=True) as watcher,
    ):
        holder.execute("LOCK TABLE analytics.fct_reservations IN EXCLUSIVE MODE")
        platform.produce(events)
        wait_until(
            lambda: watcher.execute(WAITING_LOADER).fetchone(),
            10,
            "the worker to hang between facts and state",
        )
        worker.kill()
    assert platform.loaded_offsets() == 0
    assert platform.facts() == []

    platform.worker()
    platform.wait_for_offsets(len(events))
    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)


def test_an_older_event_that_comes_later_changes_no_state(platform: Platform) -> None:
    platform.worker()
    newer = event("r-1", 2, "reservation.completed")
    older = event("r-1", 1, "reservation.held")
    platform.produce([newer])
    platform.wait_for_offsets(1)
    platform.produce([older])
    platform.wait_for_offsets(2)

    assert platform.states() == [newer.state]
    assert platform.facts() == [older.fact, newer.fact]


def test_a_lone_event_is_visible_at_once(platform: Platform) -> None:
    platform.worker()
    platform.produce([event()])
    platform.wait_for_offsets(1)
    latencies_s = []
    with psycopg.connect(platform.database.analyst_url, autocommit=True) as analyst:
        for number in range(2, 22):
            before = time.monotonic()
            platform.produce([event()])
            while analyst.execute(COUNT).fetchone() != (number,):
                assert time.monotonic() < before + 10
            latencies_s.append(time.monotonic() - before)
    # The best of twenty: nothing in the way waits by design. The rest is the machine's business.
    assert min(latencies_s) < 0.05
