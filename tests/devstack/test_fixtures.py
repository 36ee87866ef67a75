"""The fixtures that every other test stands on."""

import psycopg
import pytest
from confluent_kafka import Consumer, Producer

from devstack.kafka import KafkaCluster
from tests.conftest import MakePostgresServer, UniqueTopic
from tests.databases import AnalyticsDatabase, ReservationDatabase


@pytest.mark.parametrize("url", ["owner_url", "service_url", "relay_url"])
def test_each_role_reaches_a_migrated_reservations_database(
    reservation_database: ReservationDatabase, url: str
) -> None:
    with psycopg.connect(getattr(reservation_database, url)) as connection:
        row = connection.execute(
            "SELECT current_database(), to_regclass('public.outbox') IS NOT NULL, rolsuper"
            " FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
    assert row == (reservation_database.name, True, False)


@pytest.mark.parametrize("url", ["owner_url", "loader_url", "analyst_url"])
def test_each_role_reaches_a_migrated_analytics_database(
    analytics_database: AnalyticsDatabase, url: str
) -> None:
    with psycopg.connect(getattr(analytics_database, url)) as connection:
        row = connection.execute(
            "SELECT current_database(), to_regclass('analytics.fct_reservations') IS NOT NULL"
        ).fetchone()
    assert row == (analytics_database.name, True)


def test_a_record_written_to_a_fresh_topic_is_read_back(
    kafka: KafkaCluster, unique_topic: UniqueTopic
) -> None:
    topic = unique_topic(partitions=3, config={"cleanup.policy": "compact"})
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    producer.produce(topic, b"value", b"key", partition=2)
    assert producer.flush(20) == 0
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": topic,
            "auto.offset.reset": "earliest",
        }
    )
    try:
        consumer.subscribe([topic])
        message = consumer.poll(20)
    finally:
        consumer.close()
    assert message is not None
    assert (message.key(), message.value(), message.partition()) == (b"key", b"value", 2)


def test_a_killed_postgres_comes_back_on_its_port_with_what_was_committed(
    make_postgres_server: MakePostgresServer,
) -> None:
    server = make_postgres_server()
    with psycopg.connect(server.admin_url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
    port = server.port
    server.kill()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.admin_url)
    server.start()
    with psycopg.connect(server.admin_url) as connection:
        assert connection.execute("SELECT one FROM kept").fetchone() == (1,)
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
    assert server.port == port
