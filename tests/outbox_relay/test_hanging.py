"""A transaction that Kafka has forgotten and left open, which holds back every reader for ever.

Kafka 4.3.0 does so by itself when all brokers die amid a commit and come back at once: the
coordinator takes partitions without a leader for deleted ones, and completes the transaction
without their markers. Here its log is made to say so, as that takes some ten kills to happen.
"""

import struct

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from tests.outbox_relay.conftest import StartRelay
from tests.outbox_relay.scenes import (
    ExactlyOnceOutbox,
    exactly_once_outbox,  # noqa: F401 - a fixture
    has_open_transaction,
    says,
)
from tests.proxy import BreakableKafka
from tests.waiting import wait_until

pytestmark = pytest.mark.needs_kafka

STATES = "__transaction_state"
# The coordinator's record, in its first version: version, producer's id and epoch, timeout, state
# (4: commit completed), no partitions, and two times. A client of this name may write it.
COMPLETED = ">hqhibiqq"
COMPLETE_COMMIT, NO_PARTITIONS = 4, 0
MAY_WRITE = "__admin_client"
# How the newer version, which the coordinator itself writes, begins: version, producer's id, epoch.
BEGIN = ">hqh"
READ_TIMEOUT_S = 20.0


def state_of(servers: str, relay: str) -> tuple[TopicPartition, bytes, bytes]:
    """Where the coordinator has noted the state of this relay's transactions; its key and value."""
    consumer = Consumer(
        {"bootstrap.servers": servers, "group.id": "states", "enable.partition.eof": True}
    )
    numbers = consumer.list_topics(STATES, timeout=READ_TIMEOUT_S).topics[STATES].partitions
    consumer.assign([TopicPartition(STATES, number, 0) for number in numbers])
    ended: set[int | None] = set()
    found = []
    while len(ended) < len(numbers):
        message = consumer.poll(READ_TIMEOUT_S)
        assert message is not None
        if message.error() is not None:
            ended.add(message.partition())
        elif f".{relay}.".encode() in (message.key() or b"") and message.value():
            found.append(message)
    consumer.close()
    last = found[-1]
    return TopicPartition(STATES, last.partition() or 0), last.key() or b"", last.value() or b""


def forget(servers: str, relay: str) -> None:
    """Note that this relay's transaction is complete, whatever has become of its partitions."""
    place, key, value = state_of(servers, relay)
    _, producer_id, epoch = struct.unpack_from(BEGIN, value)
    completed = struct.pack(
        *(COMPLETED, 0, producer_id, epoch, 10_000, COMPLETE_COMMIT, NO_PARTITIONS, 1, 1)
    )
    writer = Producer({"bootstrap.servers": servers, "client.id": MAY_WRITE})
    refused: list[object] = []
    writer.produce(
        *(place.topic, completed, key, place.partition),
        on_delivery=lambda error, _: refused.append(error),
    )
    assert writer.flush(READ_TIMEOUT_S) == 0
    assert refused == [None]


def transactional_id(servers: str, relay: str) -> str:
    """The id that the relay has had: behind the version and the length in the state's key."""
    _, key, _ = state_of(servers, relay)
    return key[4:].decode()


def test_a_transaction_that_kafka_has_forgotten_is_ended_and_nothing_of_it_is_lost(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay, breakable_kafka: BreakableKafka
) -> None:
    cluster = breakable_kafka.cluster
    relay = start_relay(outbox)
    outbox.insert_many(10)
    outbox.settle()
    assert relay.stop() == 0
    # As the relay: events of every partition, and the cursor that counts them.
    producer = Producer(
        {
            "bootstrap.servers": cluster.bootstrap_servers,
            "transactional.id": transactional_id(cluster.bootstrap_servers, outbox.relay_name),
        }
    )
    producer.init_transactions(READ_TIMEOUT_S)
    producer.begin_transaction()
    for partition in range(3):
        producer.produce(outbox.topic, b'{"hangs": true}', b"hanging", partition)
    producer.produce(outbox.cursor_topic, b"{}", outbox.topic.encode(), 0)
    assert producer.flush(READ_TIMEOUT_S) == 0
    forget(cluster.bootstrap_servers, outbox.relay_name)
    (broker,) = cluster.brokers
    broker.kill()
    del producer
    broker.start()
    cluster.wait_ready()
    assert has_open_transaction(cluster, outbox.topic)
    outbox.insert_many(100)
    relay = start_relay(outbox)
    wait_until(lambda: says(relay, "Kafka had lost a transaction"), 60, "the relay to end it")
    outbox.settle()
    assert not has_open_transaction(cluster, outbox.topic)
    assert relay.stop() == 0
