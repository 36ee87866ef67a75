"""The leader's death, whatever kind it is, costs seconds; its awakening costs nothing."""

import itertools
import json
import time
from collections.abc import Iterator

import pytest

from devstack.postgres import PostgresServer
from devstack.processes import Process
from tests.outbox_relay.conftest import StartRelay
from tests.outbox_relay.records import read_topic
from tests.outbox_relay.scenes import (
    BACKLOG_ROWS,
    HANDOVER_TIMEOUT_S,
    MANY_TRANSACTIONS,
    ExactlyOnceOutbox,
    exactly_once_outbox,  # noqa: F401 - the fixture `outbox`
    freeze_in_a_transaction,
    is_end_of_transaction,
    says,
    wait_for_leader,
    with_port,
)
from tests.proxy import BreakableKafka, Proxy
from tests.waiting import wait_until

pytestmark = pytest.mark.needs_kafka

FROZEN_HANDOVER_TIMEOUT_S = 10.0
FENCED_HANDOVER_TIMEOUT_S = 12.0


@pytest.fixture
def postgres_proxy(postgres_server: PostgresServer) -> Iterator[Proxy]:
    with Proxy(lambda: postgres_server.port) as proxy:
        yield proxy


def pair(outbox: ExactlyOnceOutbox, start_relay: StartRelay) -> tuple[Process, Process]:
    """A relay that leads and one that stands by."""
    leader = start_relay(outbox)
    wait_for_leader(outbox, leader)
    standby = start_relay(outbox)
    wait_until(lambda: says(standby, "standing by"), 20, "the second to stand by")
    return leader, standby


def test_a_killed_leader_is_followed_within_seconds_and_any_number_may_stand_by(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    leader, second = pair(outbox, start_relay)
    third = start_relay(outbox)
    wait_until(lambda: says(third, "standing by"), 20, "the third to stand by")
    outbox.insert("a", "1")
    outbox.wait_for(1)
    leader.kill()
    died_at = time.monotonic()
    outbox.insert("a", "2")
    outbox.settle(5)
    assert time.monotonic() - died_at < 5
    followers = str(outbox.status()["leader"]).rpartition(":")[2]
    assert followers in {str(second.pid), str(third.pid)}


def test_a_leader_frozen_while_idle_is_followed_and_publishes_nothing_when_it_wakes_up(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    leader, standby = pair(outbox, start_relay)
    outbox.insert("a", "1")
    outbox.wait_for(1)
    leader.pause()
    outbox.insert("a", "2")
    outbox.settle(FROZEN_HANDOVER_TIMEOUT_S)
    leader.resume()
    outbox.insert("a", "3")
    outbox.settle()
    wait_until(lambda: says(leader, "standing by"), 20, "the first to stand by")
    assert leader.alive
    # It is of use again: leadership can come back to it.
    standby.kill()
    outbox.insert("a", "4")
    outbox.settle()
    wait_for_leader(outbox, leader)


def test_a_leader_frozen_in_a_transaction_is_fenced_and_publishes_nothing_when_it_wakes_up(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    outbox.insert_many(BACKLOG_ROWS)
    leader = start_relay(outbox, MANY_TRANSACTIONS)
    freeze_in_a_transaction(outbox, breakable_kafka.cluster, leader)
    standby = start_relay(outbox)
    frozen_at = time.monotonic()
    wait_for_leader(outbox, standby, FROZEN_HANDOVER_TIMEOUT_S)
    # In the middle of the backlog again, so that the sleeper wakes up into a working cluster.
    leader.resume()
    outbox.insert("key-1", '"after it woke up"')
    outbox.settle()
    assert time.monotonic() - frozen_at < HANDOVER_TIMEOUT_S
    wait_until(lambda: says(leader, "standing by"), 20, "the first to stand by")
    assert leader.alive
    wait_for_leader(outbox, standby)


def test_a_commit_that_arrives_after_the_handover_commits_nothing(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    (proxy,) = breakable_kafka.proxies
    behind_proxy = {
        "KAFKA_BOOTSTRAP_SERVERS": breakable_kafka.bootstrap_servers,
        # Without fencing its transaction would be in the way for so long.
        "OUTBOX_RELAY_TRANSACTION_TIMEOUT_MS": "15000",
    }
    leader = start_relay(outbox, behind_proxy)
    outbox.insert("a", "1")
    outbox.wait_for(1)
    start_relay(outbox)

    def sent() -> int:
        servers = outbox.bootstrap_servers
        return len(read_topic(servers, outbox.topic, isolation="read_uncommitted"))

    proxy.freeze_at(is_end_of_transaction, after=False)
    try:
        outbox.insert("a", "2")
        wait_until(lambda: proxy.frozen, 20, "the commit")
        leader.pause()
        wait_until(lambda: sent() == 3, FENCED_HANDOVER_TIMEOUT_S, "it to be sent again")
    finally:
        proxy.open()
    leader.resume()
    outbox.insert("a", "3")
    outbox.settle()
    wait_until(lambda: says(leader, "standing by"), 20, "the first to stand by")


@pytest.mark.parametrize(
    ("from_postgres", "from_kafka"),
    [
        pytest.param(True, False, id="from Postgres"),
        pytest.param(False, True, id="from Kafka"),
        pytest.param(True, True, id="from both"),
    ],
)
def test_a_leader_cut_off_is_followed_within_seconds(
    outbox: ExactlyOnceOutbox,
    start_relay: StartRelay,
    breakable_kafka: BreakableKafka,
    postgres_proxy: Proxy,
    *,
    from_postgres: bool,
    from_kafka: bool,
) -> None:
    behind_proxies = {
        "OUTBOX_RELAY_DATABASE_URL": with_port(outbox.database, postgres_proxy.port).relay_url,
        "KAFKA_BOOTSTRAP_SERVERS": breakable_kafka.bootstrap_servers,
    }
    leader = start_relay(outbox, behind_proxies)
    wait_for_leader(outbox, leader)
    standby = start_relay(outbox)
    wait_until(lambda: says(standby, "standing by"), 20, "the second to stand by")
    numbers = itertools.count(1)

    def write() -> bool:
        outbox.insert("a", json.dumps(next(numbers)))
        return str(outbox.status()["leader"]).endswith(f":{standby.pid}")

    write()
    outbox.wait_for(1)
    broken = [postgres_proxy] * from_postgres + [*breakable_kafka.proxies] * from_kafka
    try:
        for proxy in broken:
            proxy.freeze()
        wait_until(write, HANDOVER_TIMEOUT_S, "the second to lead")
        outbox.settle(HANDOVER_TIMEOUT_S)
    finally:
        for proxy in broken:
            proxy.open()
    # What the first had in its hands arrives now; none of it may count.
    wait_until(lambda: says(leader, "standing by"), 30, "the first to stand by")
    write()
    outbox.settle()
    assert leader.alive
