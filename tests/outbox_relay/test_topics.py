"""The topics command, on a real Kafka."""

import subprocess
import sys

import pytest
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

from tests.conftest import MakeKafkaCluster


def topics(bootstrap_servers: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outbox_relay", "topics", *arguments],
        env={"KAFKA_BOOTSTRAP_SERVERS": bootstrap_servers},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_topics_are_made_once_and_then_checked(make_kafka_cluster: MakeKafkaCluster) -> None:
    servers = make_kafka_cluster(brokers=1).bootstrap_servers
    made = topics(servers, "--replication-factor", "1")
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [
        "concert-reservation: made",
        "concert-catalogue: made",
        "outbox-relay-cursor.reservation-service: made",
    ]
    again = topics(servers)
    assert (again.returncode, again.stdout.count("fine")) == (0, 3)

    admin = AdminClient({"bootstrap.servers": servers})
    found = admin.list_topics(timeout=10).topics
    assert len(found["concert-reservation"].partitions) == 6
    assert len(found["concert-catalogue"].partitions) == 3

    admin.delete_topics(["concert-catalogue"])["concert-catalogue"].result(10)
    admin.create_topics([NewTopic("concert-catalogue", 1, 1)])["concert-catalogue"].result(10)
    differs = topics(servers)
    assert differs.returncode == 1
    assert "concert-catalogue: differs partitions is 1, wanted 3" in differs.stdout


@pytest.mark.needs_kafka  # waits for one as long as the command does
def test_an_unreachable_kafka_is_one_line_and_exit_1() -> None:
    done = topics("127.0.0.1:1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
