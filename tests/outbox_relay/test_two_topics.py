"""A topic that can't be written holds up itself alone, and loses nothing meanwhile."""

import psycopg
import pytest

from devstack.kafka import KafkaCluster
from tests.databases import ReservationDatabase
from tests.outbox_relay.conftest import StartRelay
from tests.outbox_relay.scenes import ExactlyOnceOutbox, make_outbox, set_topics
from tests.proxy import BreakableKafka
from tests.waiting import wait_until

pytestmark = pytest.mark.needs_kafka

ROWS = 200


def outbox_of_two(
    database: ReservationDatabase, cluster: KafkaCluster
) -> tuple[ExactlyOnceOutbox, str]:
    """An outbox that takes a second topic, which nobody has made yet."""
    outbox = make_outbox(database, cluster)
    second = f"{outbox.topic}-second"
    set_topics(database, outbox.topic, second)
    return outbox, second


def write_to_both(outbox: ExactlyOnceOutbox, second: str, first_number: int = 0) -> None:
    """Commit events for both topics in turn, of the same keys, a transaction each ten."""
    with psycopg.connect(outbox.database.service_url) as connection:
        for number in range(first_number, first_number + ROWS):
            connection.execute(
                "INSERT INTO outbox (topic, key, payload) VALUES (%s, %s, %s)",
                ((outbox.topic, second)[number % 2], f"k{number // 2 % 5}", str(number)),
            )
            if number % 10 == 9:
                connection.commit()


def settle_both(outbox: ExactlyOnceOutbox, second: str) -> None:
    outbox.settle()
    wait_until(lambda: outbox.arrived(second) == outbox.rows(second), 40, "the second topic")
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 20, "no lag")


def test_a_missing_topic_does_not_hold_the_other_up_and_flows_when_it_is_made(
    reservation_database: ReservationDatabase,
    breakable_kafka: BreakableKafka,
    start_relay: StartRelay,
) -> None:
    outbox, missing = outbox_of_two(reservation_database, breakable_kafka.cluster)
    relay = start_relay(outbox)
    write_to_both(outbox, missing)
    outbox.settle(15)
    wait_until(lambda: outbox.status()["lag_rows"] == ROWS // 2, 10, "the other's cursor")
    assert outbox.status()["quarantined"] == 0
    breakable_kafka.cluster.create_topic(missing, 2)
    write_to_both(outbox, missing, ROWS)
    settle_both(outbox, missing)
    assert relay.alive


def test_a_topic_below_its_minimum_of_replicas_does_not_hold_the_other_up_nor_fill_the_quarantine(
    reservation_database: ReservationDatabase,
    three_brokers: BreakableKafka,
    start_relay: StartRelay,
) -> None:
    cluster = three_brokers.cluster
    outbox, strict = outbox_of_two(reservation_database, cluster)
    cluster.create_topic(strict, 2, {"min.insync.replicas": "3"})
    relay = start_relay(outbox)
    write_to_both(outbox, strict)
    settle_both(outbox, strict)
    broker = cluster.brokers[2]
    broker.kill()
    try:
        write_to_both(outbox, strict, ROWS)
        outbox.settle()
        wait_until(lambda: outbox.status()["lag_rows"] == ROWS // 2, 10, "the other's cursor")
        assert outbox.status()["quarantined"] == 0
    finally:
        broker.start()
    settle_both(outbox, strict)
    assert outbox.status()["quarantined"] == 0
    assert relay.alive
