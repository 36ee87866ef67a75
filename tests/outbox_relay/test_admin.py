"""What a question costs while the broker that it goes to is dead."""

import time
import uuid
from collections.abc import Callable

import pytest
from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient

from data_platform.topics import Topics
from outbox_relay.producer import make_admin
from tests.proxy import BreakableKafka

pytestmark = pytest.mark.needs_kafka

ASKING_S = 3.0
# Of one core. It was both, until the broker was back.
MOST_CPU = 0.3


@pytest.mark.parametrize(
    "make",
    [make_admin, lambda client: Topics(client)._admin],
    ids=["outbox_relay", "data_platform"],
)
def test_a_controller_that_refuses_connections_isnt_asked_without_a_pause(
    three_brokers: BreakableKafka, make: Callable[[dict[str, str]], AdminClient]
) -> None:
    cluster = three_brokers.cluster
    topic = f"asked-{uuid.uuid4()}"
    cluster.create_topic(topic)
    admin = make({"bootstrap.servers": cluster.bootstrap_servers})
    asked = admin.describe_topics(TopicCollection([topic]), request_timeout=5)[topic]
    assert asked.exception(10) is None
    # All of them: which one the client takes for the controller is chance.
    for broker in cluster.brokers:
        broker.kill()
    try:
        began, used = time.monotonic(), time.process_time()
        asked = admin.describe_topics(TopicCollection([topic]), request_timeout=ASKING_S)[topic]
        asked.exception(2 * ASKING_S)
        elapsed_s = time.monotonic() - began
        assert time.process_time() - used < MOST_CPU * elapsed_s + 0.05
        assert elapsed_s > 1, "nobody had to wait for the dead one"
    finally:
        cluster.launch()
        cluster.wait_ready()
