"""Whatever fails under the relay, a read_committed consumer gets each event once, in order."""

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from confluent_kafka import Producer

from devstack.processes import Process
from tests.conftest import MakePostgresServer
from tests.databases import ReservationDatabase
from tests.outbox_relay.conftest import StartRelay
from tests.outbox_relay.scenes import (
    BACKLOG_ROWS,
    MANY_TRANSACTIONS,
    ExactlyOnceOutbox,
    end_sessions,
    exactly_once_outbox,  # noqa: F401 - the fixture `outbox`
    freeze_in_a_transaction,
    has_open_transaction,
    is_end_of_transaction,
    make_outbox,
    private_outbox,
    term,
    wait_for_leader,
)
from tests.proxy import BreakableKafka
from tests.waiting import wait_until

pytestmark = pytest.mark.needs_kafka

REQUEST_TIMEOUT_S = 20.0
# Less than the default, so that three times as much is soon over.
TRANSACTION_TIMEOUT_S = 3.0
SHORT = {"OUTBOX_RELAY_TRANSACTION_TIMEOUT_MS": "3000", **MANY_TRANSACTIONS}
ROLLBACKS = 40
CRASHES = 3


@pytest.fixture
def proxied_outbox(
    reservation_database: ReservationDatabase, breakable_kafka: BreakableKafka
) -> ExactlyOnceOutbox:
    """An outbox whose relay reaches Kafka through the proxy; the test's own readers too."""
    return make_outbox(
        reservation_database,
        breakable_kafka.cluster,
        bootstrap_servers=breakable_kafka.bootstrap_servers,
    )


def test_a_relay_killed_in_a_transaction_holds_readers_up_no_longer_than_its_timeout(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    outbox.insert_many(BACKLOG_ROWS)
    relay = start_relay(outbox, SHORT)
    freeze_in_a_transaction(outbox, breakable_kafka.cluster, relay)
    relay.kill()
    wait_until(
        lambda: not has_open_transaction(breakable_kafka.cluster, outbox.topic),
        TRANSACTION_TIMEOUT_S + 3,
        "the transaction to be given up",
    )
    start_relay(outbox)
    outbox.settle()


def test_after_a_crash_of_postgres_no_row_hides_behind_the_ids_of_lost_rollbacks(
    make_postgres_server: MakePostgresServer,
    breakable_kafka: BreakableKafka,
    start_relay: StartRelay,
) -> None:
    # What isn't committed reaches the disk only when somebody flushes it.
    server = make_postgres_server({"wal_writer_delay": "10s", "autovacuum": "off"})
    outbox = private_outbox(server, breakable_kafka.cluster)
    relay = start_relay(outbox)
    wait_for_leader(outbox, relay)
    for crash in range(1, CRASHES + 1):
        relay.pause()
        outbox.insert("a", json.dumps([crash, 0]))
        with outbox.owner() as connection:
            for _ in range(ROLLBACKS):
                connection.execute("BEGIN; SELECT pg_current_xact_id(); ROLLBACK")
        # The copy of the cursor in Postgres, within a second, would flush them: it has to wait.
        in_the_way = psycopg.connect(outbox.database.owner_url)
        in_the_way.execute("SELECT FROM outbox_relay_cursor FOR UPDATE")
        relay.resume()
        outbox.wait_for((crash - 1) * (ROLLBACKS + 11) + 1)
        server.kill()
        in_the_way.close()
        server.start()
        for number in range(1, ROLLBACKS + 11):
            outbox.insert("a", json.dumps([crash, number]))
        outbox.settle()
    assert relay.alive


def test_anothers_open_transaction_in_the_cursor_topic_makes_no_stale_cursor(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    relay = start_relay(outbox)
    outbox.insert("a", "1")
    outbox.wait_for(1)
    stranger = Producer(
        {
            "bootstrap.servers": outbox.bootstrap_servers,
            "transactional.id": f"stranger-{outbox.relay_name}",
            "transaction.timeout.ms": 60_000,
        }
    )
    stranger.init_transactions(REQUEST_TIMEOUT_S)
    stranger.begin_transaction()
    stranger.produce(outbox.cursor_topic, b"{}", b"a stranger's")
    stranger.flush(REQUEST_TIMEOUT_S)
    # These cursors are committed, and hidden behind the stranger's open transaction.
    for number in range(2, 12):
        outbox.insert("a", str(number))
    outbox.wait_for(11)
    relay.kill()
    successor = start_relay(outbox)
    outbox.insert("a", "12")
    threading.Event().wait(3)
    assert len(outbox.arrived()["a"]) in {11, 12}
    stranger.abort_transaction(REQUEST_TIMEOUT_S)
    outbox.settle()
    assert successor.alive


def test_kafka_away_for_three_times_the_transaction_timeout_costs_nothing_but_time(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    outbox.insert_many(BACKLOG_ROWS)
    relay = start_relay(outbox, SHORT)
    (broker,) = breakable_kafka.cluster.brokers
    freeze_in_a_transaction(outbox, breakable_kafka.cluster, relay)
    away_since = time.monotonic()
    broker.pause()
    relay.resume()
    outbox.insert("b", '"written meanwhile"')
    wait_until(
        lambda: time.monotonic() - away_since > 3 * TRANSACTION_TIMEOUT_S,
        4 * TRANSACTION_TIMEOUT_S,
        "three times the transaction timeout",
    )
    assert relay.alive
    broker.resume()
    outbox.settle(60)
    assert relay.alive
    # Once said, not for each attempt.
    assert len(relay.log.read_text().splitlines()) < 40


@pytest.mark.parametrize(
    ("after", "cut", "hold_s"),
    [
        pytest.param(True, False, 3, id="answered late"),
        pytest.param(True, True, 1, id="taken and the answer lost"),
        pytest.param(False, True, 1, id="lost"),
        pytest.param(False, False, TRANSACTION_TIMEOUT_S + 3, id="taken after the timeout"),
    ],
)
def test_a_commit_without_an_answer_is_neither_lost_nor_repeated(
    proxied_outbox: ExactlyOnceOutbox,
    start_relay: StartRelay,
    breakable_kafka: BreakableKafka,
    *,
    after: bool,
    cut: bool,
    hold_s: float,
) -> None:
    outbox = proxied_outbox
    (proxy,) = breakable_kafka.proxies
    relay = start_relay(outbox, SHORT)
    outbox.insert("a", "1")
    outbox.wait_for(1)
    proxy.freeze_at(is_end_of_transaction, after=after)
    try:
        outbox.insert("a", "2")
        wait_until(lambda: proxy.frozen, 20, "the commit")
        outbox.insert("a", "3")
        threading.Event().wait(hold_s)
        if cut:
            proxy.cut()
    finally:
        proxy.open()
    outbox.settle()
    outbox.insert("a", "4")
    outbox.settle()
    assert relay.alive


def insert_one_oversize(outbox: ExactlyOnceOutbox) -> int:
    """Commit 300 events of three keys, one of which Kafka refuses; return that one's id."""
    pad = random.Random(1).randbytes(3_000).hex()  # noqa: S311 - compression can't make it fit
    with psycopg.connect(outbox.database.owner_url) as connection:
        for number in range(300):
            connection.execute(
                "INSERT INTO outbox (topic, key, payload) VALUES (%s, %s, %s)",
                (outbox.topic, "abc"[number % 3], json.dumps([number, pad * (number == 100)])),
            )
        found = connection.execute(
            "SELECT id FROM outbox WHERE length(payload::text) > 2000"
        ).fetchone()
    assert found is not None
    return int(found[0])


def test_what_kafka_refuses_waits_with_the_later_ones_of_its_key_until_it_is_released(
    reservation_database: ReservationDatabase,
    breakable_kafka: BreakableKafka,
    start_relay: StartRelay,
) -> None:
    cluster = breakable_kafka.cluster
    outbox = make_outbox(reservation_database, cluster, config={"max.message.bytes": "2000"})
    refused_id = insert_one_oversize(outbox)
    relay = start_relay(outbox)
    waiting_rows = 67  # numbers 100, 103, … 298 of key b
    outbox.wait_for(300 - waiting_rows)
    outbox.insert("b", '"later"')
    outbox.insert("a", '"later"')
    outbox.wait_for(300 - waiting_rows + 1)
    wait_until(lambda: outbox.status()["quarantined"] == waiting_rows + 1, 20, "the quarantine")
    truth = outbox.rows()
    held_back = truth["b"][-(waiting_rows + 1) :]
    assert outbox.arrived() == truth | {"b": truth["b"][: -len(held_back)]}
    assert str(refused_id) in outbox.succeed("quarantine", "list")

    # It is kept in the database, not in the relay's memory.
    relay.kill()
    relay = start_relay(outbox)
    outbox.insert("b", '"still waiting"')
    outbox.insert("c", '"later"')
    outbox.wait_for(300 - waiting_rows + 2)
    wait_until(lambda: outbox.status()["quarantined"] == waiting_rows + 2, 20, "the quarantine")

    cluster.set_topic_config(outbox.topic, {"max.message.bytes": "1000000"})
    outbox.succeed("quarantine", "release", str(refused_id))
    outbox.settle()
    wait_until(lambda: outbox.status()["quarantined"] == 0, 20, "the quarantine to be empty")
    outbox.insert("b", '"the last"')
    outbox.settle()
    assert relay.alive


def test_a_change_of_the_delivery_loses_and_repeats_nothing(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    number = 0
    for delivery in ("at_least_once", "exactly_once", "at_least_once", "exactly_once"):
        outbox.insert("a", f'"{number}, while no relay runs"')
        relay = start_relay(outbox, {"OUTBOX_RELAY_DELIVERY": delivery})
        outbox.wait_for(number + 1)
        outbox.insert("a", f'"{number}, {delivery}"')
        number += 2
        outbox.wait_for(number)
        assert outbox.status()["delivery"] == delivery
        if delivery == "exactly_once":
            relay.kill()  # the copy of its cursor in Postgres is not the newest
        else:
            assert relay.stop() == 0
    assert outbox.arrived() == outbox.rows()


def lane_waits_for_a_lock(outbox: ExactlyOnceOutbox) -> bool:
    with psycopg.connect(outbox.database.relay_url) as connection:
        found = connection.execute(
            "SELECT FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = %s AND wait_event_type = 'Lock'",
            (f"outbox-relay lane {outbox.topic}",),
        ).fetchone()
    return found is not None


@contextmanager
def stored_cursor_locked(outbox: ExactlyOnceOutbox) -> Iterator[None]:
    with psycopg.connect(outbox.database.owner_url) as in_the_way:
        in_the_way.execute("SELECT FROM outbox_relay_cursor FOR UPDATE")
        yield


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_a_kill_in_the_midst_of_a_change_of_the_delivery_loses_and_repeats_nothing(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, delivery: str
) -> None:
    def start(delivery: str) -> Process:
        return start_relay(outbox, {"OUTBOX_RELAY_DELIVERY": delivery})

    def kill(relay: Process) -> None:
        relay.kill()
        end_sessions(outbox, f"lane {outbox.topic}")

    relay = start("exactly_once")
    outbox.insert("a", "1")
    outbox.wait_for(1)
    if delivery == "exactly_once":  # and back again
        relay.stop()
        relay = start("at_least_once")
        outbox.insert("a", "2")
        wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "the second")
        assert relay.stop() == 0
    else:  # with a copy in Postgres that is not the newest
        with stored_cursor_locked(outbox):
            outbox.insert("a", "2")
            outbox.wait_for(2)
            kill(relay)
    last_term = term(outbox)
    relay = start(delivery)
    wait_until(lambda: term(outbox) > last_term, 20, "a term")
    with stored_cursor_locked(outbox):
        wait_until(lambda: lane_waits_for_a_lock(outbox), 20, "the change to be stored")
        kill(relay)
    assert outbox.status()["delivery"] != delivery
    relay = start(delivery)
    wait_until(lambda: outbox.status()["delivery"] == delivery, 20, "the change")
    kill(relay)
    start(delivery)
    outbox.insert("a", "3")
    outbox.settle()
