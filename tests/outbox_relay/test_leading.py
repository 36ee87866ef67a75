"""A term: what it outlives, what ends it, and how a relay gets over what hangs."""

import re
import time
from dataclasses import replace
from pathlib import Path

import httpx
import psycopg
import pytest
from confluent_kafka.admin import AdminClient
from psycopg.conninfo import make_conninfo

from devstack.kafka import Broker
from devstack.processes import Process
from devstack.state import free_port
from tests.conftest import MakePostgresServer, RunProcess
from tests.databases import ReservationDatabase
from tests.outbox_relay.conftest import StartRelay
from tests.outbox_relay.scenes import (
    BACKLOG_ROWS,
    MANY_TRANSACTIONS,
    ExactlyOnceOutbox,
    exactly_once_outbox,  # noqa: F401 - the fixture `outbox`
    freeze_in_a_transaction,
    make_outbox,
    private_outbox,
    says,
    term,
)
from tests.proxy import BreakableKafka
from tests.waiting import wait_until

pytestmark = pytest.mark.needs_kafka

STALL_S = 8.0
# A frozen broker is fenced after three seconds; then the client has to notice.
FROZEN_BROKER_TIMEOUT_S = 60.0


def leader_of_the_cursor(outbox: ExactlyOnceOutbox, kafka: BreakableKafka) -> Broker:
    """The broker that every transaction needs."""
    admin = AdminClient({"bootstrap.servers": kafka.cluster.bootstrap_servers})
    found = admin.list_topics(outbox.cursor_topic, timeout=20).topics[outbox.cursor_topic]
    leader = found.partitions[0].leader
    return next(broker for broker in kafka.cluster.brokers if broker.node_id == leader)


def sessions(outbox: ExactlyOnceOutbox, what: str) -> set[int]:
    """Server processes of the relay's sessions that call themselves so."""
    with psycopg.connect(outbox.database.relay_url) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = %s",
            (f"outbox-relay {what}",),
        ).fetchall()
    return {pid for (pid,) in found}


def test_a_short_stall_of_kafka_does_not_end_the_term_of_a_leader_that_nobody_could_follow(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    relay = start_relay(outbox)
    outbox.insert("a", "1")
    outbox.wait_for(1)
    standby = start_relay(outbox)  # which doesn't reach Kafka either
    wait_until(lambda: says(standby, "standing by"), 20, "the second to stand by")
    before = term(outbox)
    (broker,) = breakable_kafka.cluster.brokers
    broker.pause()
    stalled_at = time.monotonic()
    try:
        outbox.insert("a", "2")
        wait_until(lambda: time.monotonic() - stalled_at > STALL_S, STALL_S + 2, "the stall")
    finally:
        broker.resume()
    outbox.settle()
    assert term(outbox) == before
    assert not says(relay, "stopped leading")
    assert says(relay, '"leading"')
    assert says(standby, "KafkaAwayError")


@pytest.mark.parametrize(
    "starting", [False, True], ids=["of a relay that runs", "of one that starts"]
)
def test_one_frozen_broker_of_three_stops_publishing_for_a_bounded_time_only(
    reservation_database: ReservationDatabase,
    three_brokers: BreakableKafka,
    start_relay: StartRelay,
    *,
    starting: bool,
) -> None:
    outbox = make_outbox(reservation_database, three_brokers.cluster)
    relay = start_relay(outbox)
    outbox.insert_many(100)
    outbox.settle()
    broker = leader_of_the_cursor(outbox, three_brokers)
    if starting:
        assert relay.stop() == 0
    broker.pause()
    try:
        if starting:
            relay = start_relay(outbox)
        outbox.insert_many(100)
        outbox.settle(FROZEN_BROKER_TIMEOUT_S)
        assert relay.alive
    finally:
        broker.resume()
        three_brokers.cluster.wait_ready()
    outbox.insert_many(100)
    outbox.settle()
    assert relay.alive


def test_postgres_restarted_while_the_lane_s_transaction_is_open_costs_nothing_but_time(
    make_postgres_server: MakePostgresServer,
    breakable_kafka: BreakableKafka,
    start_relay: StartRelay,
) -> None:
    server = make_postgres_server()
    outbox = private_outbox(server, breakable_kafka.cluster)
    outbox.insert_many(BACKLOG_ROWS)
    relay = start_relay(outbox, MANY_TRANSACTIONS)
    freeze_in_a_transaction(outbox, breakable_kafka.cluster, relay)
    server.kill()
    server.start()
    relay.resume()
    outbox.settle()
    assert relay.alive


def test_a_topic_added_while_the_relay_leads_is_published_in_the_same_term(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    relay = start_relay(outbox)
    outbox.insert("a", "1")
    outbox.wait_for(1)
    before = term(outbox)
    added = f"{outbox.topic}-added"
    breakable_kafka.cluster.create_topic(added, 2)
    with outbox.owner() as connection:
        connection.execute("INSERT INTO outbox_topics VALUES (%s, 1000)", (added,))
    replace(outbox, topic=added).insert("a", "2")
    wait_until(lambda: outbox.arrived(added) == {"a": [b"2"]}, 20, "the added topic's event")
    assert term(outbox) == before
    assert sessions(outbox, f"lane {added}")
    assert sessions(outbox, "leader")
    assert says(relay, '"started"')


def test_a_topic_that_the_outbox_takes_no_more_is_published_to_its_end(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    removed = f"{outbox.topic}-removed"
    breakable_kafka.cluster.create_topic(removed, 2)
    with outbox.owner() as connection:
        connection.execute("INSERT INTO outbox_topics VALUES (%s, 1000)", (removed,))
    relay = start_relay(outbox)
    of_removed = replace(outbox, topic=removed)
    of_removed.insert("a", "1")
    wait_until(lambda: outbox.arrived(removed) == {"a": [b"1"]}, 20, "its first event")
    assert relay.stop() == 0
    of_removed.insert("a", "2")
    outbox.insert("a", "1")
    with outbox.owner() as connection:
        connection.execute("DELETE FROM outbox_topics WHERE topic = %s", (removed,))
    start_relay(outbox)
    wait_until(lambda: outbox.arrived(removed) == {"a": [b"1", b"2"]}, 20, "its last event")

    def kept_for() -> str | None:
        with outbox.owner() as connection:
            found = connection.execute("SELECT outbox_kept_for(0)").fetchone()
        assert found is not None
        return None if found[0] is None else str(found[0])

    # Its cursor goes on, or retention would wait for it for ever.
    outbox.insert("a", "2")
    wait_until(lambda: kept_for() is None, 20, "both cursors to have passed everything")


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
def test_an_outbox_that_is_empty_at_the_first_start_is_published_from_its_first_row_on(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, delivery: str
) -> None:
    environment = {"OUTBOX_RELAY_DELIVERY": delivery}
    relay = start_relay(outbox, environment)
    wait_until(lambda: says(relay, '"leading"'), 20, "the relay to lead")
    assert relay.stop() == 0
    relay = start_relay(outbox, environment)
    wait_until(lambda: says(relay, '"leading"'), 20, "the relay to lead again")
    outbox.insert("a", "1")
    outbox.insert("a", "2")
    outbox.settle()
    assert relay.stop() == 0
    outbox.insert("a", "3")
    start_relay(outbox, environment)
    outbox.settle()


# As `python -m outbox_relay run`, with a lane that hangs once, and with less patience.
HANGING = """
import sys, threading
from outbox_relay import __main__, lane, metrics, relay
read, hangs = lane.reader.read, iter([True])
def hanging_read(connection, *arguments, **more):
    chunk = read(connection, *arguments, **more)
    if chunk.rows and next(hangs, False):
        HANG
    return chunk
lane.reader.read = hanging_read
metrics.Metrics.healthy.__defaults__ = (2.0,)
relay.LANES_END_WITHIN_S = 1.0
__main__.main()
"""


def start_hanging(
    outbox: ExactlyOnceOutbox, run_process: RunProcess, folder: Path, hang: str
) -> Process:
    (folder / "hanging_relay.py").write_text(HANGING.replace("HANG", hang))
    environment = outbox.environment(PYTHONPATH=str(folder))
    return run_process("hanging_relay", "run", env=environment)


def test_a_lane_that_hangs_in_postgres_is_noticed_and_got_over(
    outbox: ExactlyOnceOutbox, run_process: RunProcess, tmp_path: Path
) -> None:
    relay = start_hanging(
        outbox, run_process, tmp_path, "connection.execute('SELECT pg_sleep(25)')"
    )
    outbox.insert("a", "1")
    outbox.settle(20)
    assert relay.alive
    assert says(relay, "a lane doesn't come round")


def test_a_process_whose_lane_hangs_for_good_ends(
    outbox: ExactlyOnceOutbox, run_process: RunProcess, tmp_path: Path
) -> None:
    relay = start_hanging(outbox, run_process, tmp_path, "threading.Event().wait()")
    outbox.insert("a", "1")
    wait_until(lambda: not relay.alive, 20, "the process to end")
    assert relay.stop() == 1
    assert says(relay, "ends because it hangs")
    assert outbox.topic in relay.log.read_text()


def test_a_frozen_postgres_is_waited_for_and_no_thread_is_left_behind(
    make_postgres_server: MakePostgresServer,
    breakable_kafka: BreakableKafka,
    start_relay: StartRelay,
) -> None:
    server = make_postgres_server()
    outbox = private_outbox(server, breakable_kafka.cluster)
    relay = start_relay(outbox)
    outbox.insert("a", "1")
    outbox.settle()
    server.pause()
    try:
        wait_until(lambda: says(relay, "doesn't answer"), 20, "the outage to be said")
    finally:
        server.resume()
    outbox.insert("a", "2")
    outbox.settle()
    assert relay.alive
    wait_until(lambda: len(sessions(outbox, f"lane {outbox.topic}")) == 1, 20, "one lane only")


def test_a_wrong_password_is_waited_for_and_said_once_without_it(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    wrong = make_conninfo(outbox.database.relay_url, password="wr0ng-word")
    port = free_port()
    relay = start_relay(outbox, {"OUTBOX_RELAY_DATABASE_URL": wrong, "METRICS_PORT": str(port)})

    def attempts() -> float:
        try:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        except httpx.TransportError:  # it has only just been started
            return 0
        counted = re.search(r'retries_total{reason="OperationalError",topic=""} (\S+)', text)
        return float(counted[1]) if counted else 0

    wait_until(lambda: attempts() >= 3, 20, "some attempts")
    assert relay.log.read_text().count("password authentication failed") == 1
    assert not says(relay, "wr0ng-word")
    assert relay.stop() == 0
