"""Partitions come and go: no row is lost, no booking waits, and nothing grows."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from outbox_relay import leadership, reader, retention, sql
from outbox_relay.retention import Outcome, Retention
from tests.conftest import MakePostgresServer
from tests.databases import ReservationDatabase, create_reservation_database
from tests.waiting import wait_until

TOPIC = "concert-reservation"
HOURS = 72.0
INSERT = """
INSERT INTO outbox (topic, key, payload, created_at)
VALUES (%s, 'k', %s, clock_timestamp() - make_interval(secs => %s * 3600.0))
"""
EVERYTHING_IS_PUBLISHED = """
INSERT INTO outbox_relay_cursor (relay_name, topic, delivery, leader_epoch, leader,
    published_snapshot, system_identifier, database_oid, timeline, wal_lsn)
SELECT %s, topic, 'at_least_once', 1, '', pg_current_snapshot(), 1, 1, '1', '0/0'
FROM outbox_topics
ON CONFLICT (relay_name, topic) DO UPDATE SET published_snapshot = excluded.published_snapshot
"""
FILL = """
INSERT INTO outbox (topic, key, payload, created_at)
SELECT %s, 'k', '1', clock_timestamp() - interval '3 days' FROM generate_series(1, %s)
"""
WAITS_FOR_A_LOCK = "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted"
BEYOND_ALL_PARTITIONS = 99 * 10**10 + 5


class House:
    """An outbox with connections of its owner and of the relay; rows are numbered."""

    def __init__(self, database: ReservationDatabase) -> None:
        self.database = database
        self.owner = psycopg.connect(database.owner_url, autocommit=True)
        self.relay = leadership.connect(database.relay_url)

    def close(self) -> None:
        self.owner.close()
        self.relay.close()

    def writer(self) -> psycopg.Connection:
        return psycopg.connect(self.database.owner_url)

    def insert(self, number: int, age_hours: float = 0.0) -> None:
        self.owner.execute(INSERT, (TOPIC, json.dumps(number), age_hours))

    def publish_all(self, relay: str = "relay") -> None:
        self.owner.execute(EVERYTHING_IS_PUBLISHED, (relay,))

    def rows(self) -> dict[int, str]:
        """The rows that are there, with their partitions."""
        return dict(
            self.owner.execute("SELECT payload::text::int, tableoid::regclass::text FROM outbox")
        )

    def partitions(self) -> list[int]:
        found = self.owner.execute("SELECT number FROM outbox_partitions ORDER BY number")
        return [number for (number,) in found]

    def relay_waits(self) -> bool:
        """Whether the relay's session waits for a lock."""
        pid = self.relay.info.backend_pid
        return self.owner.execute(WAITS_FOR_A_LOCK, (pid,)).fetchone() == (1,)

    def roll_over(self) -> None:
        """End the partition in use, as maintenance does after a while."""
        in_use = retention.survey(self.relay)[0].in_use
        assert self.relay.execute(sql.ROLL_OVER, {"in_use": in_use}).fetchone() != (None,)

    def maintain(self, hours: float = HOURS) -> list[str]:
        """Do all that is due; return the deeds."""
        keeper, deeds = Retention(hours), []
        while (outcome := keeper.maintain(self.relay)).did:
            deeds.append(f"{outcome.did} {outcome.partition}")
            assert len(deeds) < 100
        return deeds


@pytest.fixture
def house(reservation_database: ReservationDatabase) -> Iterator[House]:
    house = House(reservation_database)
    yield house
    house.close()


def in_the_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except psycopg.Error as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def live_through_several_partitions(house: House) -> None:
    for generation in range(5):
        house.insert(generation, age_hours=HOURS + 1 if generation < 3 else 10)
        house.maintain()
        assert len(house.partitions()) >= 3
    assert house.rows() == {n: f"outbox_{n}" for n in range(5)}
    house.publish_all()
    deeds = house.maintain()
    assert [deed for deed in deeds if "emptied" in deed] == [
        f"emptied outbox_{n}" for n in range(3)
    ]
    assert [deed for deed in deeds if "dropped" in deed] == [
        f"dropped outbox_{n}" for n in range(3)
    ]
    assert house.rows() == {3: "outbox_3", 4: "outbox_4"}
    assert house.partitions() == [3, 4, 5, 6, 7]


def test_partitions_are_made_ahead_and_dropped_when_published_and_old(house: House) -> None:
    live_through_several_partitions(house)


def test_they_are_on_postgresql_16_too(
    make_postgres_server: MakePostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVSTACK_POSTGRES", "16")
    house = House(create_reservation_database(make_postgres_server()))
    try:
        live_through_several_partitions(house)
    finally:
        house.close()


def test_a_partition_is_cut_by_time_and_the_newest_grows_when_there_are_too_many(
    house: House,
) -> None:
    house.insert(1, age_hours=HOURS / 8 - 0.1)
    assert house.maintain() == []
    house.roll_over()
    for number in range(2, 30):
        house.insert(number, age_hours=HOURS / 8 + 0.1)
        house.maintain()
    # Nothing is published, so nothing goes.
    assert len(house.rows()) == 29
    assert len(house.partitions()) == retention.MAX_PARTITIONS


def test_a_partition_that_somebody_else_has_ended_is_not_ended_again(house: House) -> None:
    assert house.relay.execute(sql.ROLL_OVER, {"in_use": 0}).fetchone() == (1,)
    assert house.relay.execute(sql.ROLL_OVER, {"in_use": 0}).fetchone() == (None,)
    house.insert(1)
    assert house.rows() == {1: "outbox_1"}


def test_what_a_writer_in_flight_commits_while_its_partition_is_about_to_go_is_kept(
    house: House,
) -> None:
    # Time enough for the writer to commit while the partition's lock is waited for.
    house.owner.execute("ALTER FUNCTION outbox_empty_partition SET lock_timeout = '30s'")
    with house.writer() as writer:
        writer.execute(INSERT, (TOPIC, "1", HOURS + 1))
        house.insert(2, age_hours=HOURS + 1)
        house.roll_over()
        house.publish_all()
        empty = {"number": 0}
        thread, results = in_the_background(
            lambda: house.relay.execute(sql.EMPTY_PARTITION, empty).fetchone()
        )
        wait_until(house.relay_waits, 10, "no lock is waited for")
    thread.join()
    assert results == [(False,)]
    assert house.rows() == {1: "outbox_0", 2: "outbox_0"}
    assert house.maintain() == ["added outbox_3"]
    house.publish_all()
    assert house.maintain()[-2:] == ["emptied outbox_0", "dropped outbox_0"]


def test_a_snapshot_older_than_the_lock_is_refused(house: House) -> None:
    with house.writer() as frozen:
        frozen.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        with pytest.raises(psycopg.errors.InvalidTransactionState):
            frozen.execute(sql.EMPTY_PARTITION, {"number": 0})


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        (sql.DROP_PARTITION, "outbox"),
        (sql.EMPTY_PARTITION, "outbox_0"),
        (sql.ADD_PARTITION, "outbox_default"),
    ],
)
def test_a_booking_does_not_wait_behind_maintenance_that_waits_for_a_lock(
    house: House, statement: str, table: str
) -> None:
    house.insert(1)
    house.publish_all()
    house.roll_over()
    with house.writer() as holder, house.writer() as booking:
        holder.execute(f"LOCK TABLE ONLY {table} IN ACCESS SHARE MODE")
        # The session's own lock_timeout of 5 s would hold the booking up for longer.
        booking.execute("SET statement_timeout = '2s'")
        parameters = {"number": 0}
        thread, results = in_the_background(lambda: house.relay.execute(statement, parameters))
        wait_until(lambda: bool(results) or house.relay_waits(), 10, "no lock is waited for")
        booking.execute(INSERT, (TOPIC, "2", 0))
        thread.join()
        assert isinstance(results[0], psycopg.errors.LockNotAvailable)


def test_a_long_transaction_keeps_no_space_and_nobody_asks_for_its_lock(house: House) -> None:
    house.insert(1, age_hours=HOURS + 1)
    house.roll_over()
    house.publish_all()
    with house.writer() as long_lived:
        long_lived.execute(INSERT, (TOPIC, "2", 0))
        # Asking for the lock would be seen by this function.
        house.owner.execute("ALTER FUNCTION outbox_drop_partition SET statement_timeout = 1")
        assert house.maintain()[-1] == "emptied outbox_0"
        outcome = Retention(HOURS).maintain(house.relay)
        assert outcome.did is None
        assert outcome.busy is not None
        assert f"process {long_lived.info.backend_pid} holds a lock" in outcome.busy
    house.owner.execute("ALTER FUNCTION outbox_drop_partition RESET statement_timeout")
    assert house.maintain() == ["dropped outbox_0"]


def test_a_row_that_one_of_two_relays_has_not_published_keeps_its_partition(house: House) -> None:
    house.insert(1, age_hours=HOURS + 1)
    house.publish_all("behind")
    house.insert(2, age_hours=HOURS + 1)
    house.publish_all("ahead")
    house.roll_over()
    house.maintain()
    assert house.rows() == {1: "outbox_0", 2: "outbox_0"}
    (pruned,) = Retention(HOURS).prune(house.relay)
    assert pruned.name == "outbox_0"
    assert pruned.kept == "not published: relay behind, topic concert-catalogue"
    house.publish_all("behind")
    house.maintain()
    assert house.rows() == {}


def test_nothing_goes_before_every_topic_has_a_cursor(house: House) -> None:
    house.insert(1, age_hours=HOURS + 1)
    house.roll_over()
    house.maintain()
    (pruned,) = Retention(HOURS).prune(house.relay)
    assert pruned.kept == "not published: no relay has run"
    house.publish_all()
    house.owner.execute("INSERT INTO outbox_topics VALUES ('new-topic', 1000)")
    house.maintain()
    (pruned,) = Retention(HOURS).prune(house.relay)
    assert pruned.kept == "not published: relay relay, topic new-topic"
    assert house.rows() == {1: "outbox_0"}
    house.publish_all()
    house.maintain()
    assert house.rows() == {}


def test_rows_beyond_all_partitions_are_caught_raise_an_alarm_and_stand_in_nothings_way(
    house: House,
) -> None:
    house.owner.execute("SELECT setval('outbox_id_seq', %s)", (BEYOND_ALL_PARTITIONS,))
    house.insert(1, age_hours=HOURS + 1)
    assert house.rows() == {1: "outbox_default"}
    with capture_logs() as logs:
        keeper = Retention(HOURS)
        deeds = []
        while (outcome := keeper.maintain(house.relay)).did:
            assert outcome.default_filled
            deeds.append(outcome.did)
    errors = [entry["event"] for entry in logs if entry["log_level"] == "error"]
    assert errors == ["default_partition_has_rows"]
    assert deeds[:4] == ["fenced", "fenced", "added", "fenced"]
    house.insert(2)
    assert house.rows() == {1: "outbox_default", 2: "outbox_101"}
    house.publish_all()
    with capture_logs() as logs:
        assert "emptied outbox_default" in house.maintain()
        assert keeper.maintain(house.relay).default_filled is False
    assert "default_partition_is_empty" in {entry["event"] for entry in logs}
    assert house.rows() == {2: "outbox_101"}
    assert house.partitions() == [101, 102, 103]


def test_no_row_of_the_default_partition_is_read_while_it_is_locked(house: House) -> None:
    house.owner.execute("SELECT setval('outbox_id_seq', %s)", (BEYOND_ALL_PARTITIONS,))
    house.insert(1)
    notices = []
    house.owner.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    assert house.owner.execute(sql.ADD_PARTITION).fetchone() == (None,)
    assert house.owner.execute(sql.FENCE_DEFAULT).fetchone() == (False,)
    # Fenced but not validated, it would be read.
    assert house.owner.execute(sql.ADD_PARTITION).fetchone() == (None,)
    house.insert(2)
    assert house.owner.execute(sql.FENCE_DEFAULT).fetchone() == (True,)
    house.owner.execute("SET client_min_messages = debug1")
    assert house.owner.execute(sql.ADD_PARTITION).fetchone() == (101,)
    assert any("implied by existing constraints" in (notice or "") for notice in notices)


def test_prune_drops_the_partition_in_use_too_and_says_why_others_stay(house: House) -> None:
    house.insert(1, age_hours=2)
    house.roll_over()
    house.insert(2, age_hours=0.5)
    house.insert(3, age_hours=0.5)
    house.publish_all()
    kept = {each.name: each.kept for each in Retention(1).prune(house.relay)}
    assert kept == {"outbox_0": None, "outbox_1": "in use"}
    house.roll_over()
    kept = {each.name: each.kept for each in Retention(1).prune(house.relay)}
    assert kept == {"outbox_1": "its newest event is 0.5 h old"}
    house.insert(4)
    house.publish_all()
    pruned = Retention(0).prune(house.relay)
    assert [(each.name, each.ids, each.kept) for each in pruned] == [
        ("outbox_1", 2, None),
        ("outbox_2", 1, None),
    ]
    assert house.rows() == {}
    assert house.partitions() == [3, 4, 5]


def test_relays_that_maintain_at_the_same_time_do_each_step_once_and_lose_no_row(
    house: House,
) -> None:
    relays = [leadership.connect(house.database.relay_url) for _ in range(2)]
    stop = threading.Event()

    def work(relay: psycopg.Connection) -> list[Outcome]:
        keeper, outcomes = Retention(0), []
        while not stop.is_set():
            outcomes.append(keeper.maintain(relay))
        return outcomes

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(work, relay) for relay in relays]
        number = 0
        try:
            while number < 200 or house.partitions()[-1] < 8:
                number += 1
                house.insert(number, age_hours=1)
                if number == 100:
                    house.publish_all()
                assert number < 20_000, "nobody maintains"
        finally:
            stop.set()
        outcomes = [outcome for future in done for outcome in future.result()]
    for relay in relays:
        relay.close()
    deeds = [(outcome.did, outcome.partition) for outcome in outcomes]
    deeds = [deed for deed in deeds if deed[0] in {"added", "rolled_over", "dropped"}]
    assert len(deeds) == len(set(deeds)) > 10
    kept = {row for row in house.rows() if row > 100}
    assert kept == set(range(101, number + 1))
    assert "outbox_default" not in house.rows().values()


def idle_pages(house: House) -> int:
    """Return how many pages a poll touches that finds nothing new."""
    found = house.owner.execute("SELECT pg_current_snapshot()::text").fetchone()
    assert found is not None
    parameters = {
        **reader.Position(found[0], "0/0").unpublished(),
        "topic": TOPIC,
        "max_rows": 5_000,
        "max_bytes": 1_000_000,
    }
    cursor = psycopg.ClientCursor[Any](house.relay)
    cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql.READ_FRESH}", parameters)
    ((plan,),) = cursor.fetchall()
    return int(plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"])


def test_reading_costs_the_same_however_many_partitions_have_come_and_gone(house: House) -> None:
    costs = []
    for generation in range(12):
        for number in range(20):
            house.insert(generation * 20 + number, age_hours=1)
        house.publish_all()
        Retention(0).prune(house.relay)
        costs.append(idle_pages(house))
    assert max(costs) <= 10, costs
    assert costs[-1] <= costs[1], costs


def test_a_poll_of_all_the_partitions_there_may_be_touches_few_pages(house: House) -> None:
    for _ in range(20):
        house.owner.execute(FILL, (TOPIC, 2_000))
        house.maintain()
    assert len(house.partitions()) == retention.MAX_PARTITIONS
    assert idle_pages(house) <= 4 * retention.MAX_PARTITIONS
