"""The short form of the loader's part of `make chaos`."""

from pathlib import Path

import pytest

from chaos import loader
from devstack.kafka import KafkaCluster
from tests.conftest import MakePostgresServer

pytestmark = [pytest.mark.needs_postgres, pytest.mark.needs_kafka]

DURATION_S = 18
EVENTS = 40_000


def test_workers_killed_and_frozen_and_a_database_restarted_twice_leave_the_tables_right(
    make_postgres_server: MakePostgresServer, kafka: KafkaCluster, tmp_path: Path
) -> None:
    outcome = loader.run(
        make_postgres_server(), kafka, tmp_path, seconds=DURATION_S, events=EVENTS, seed=1
    )
    assert outcome.differences == []
    assert outcome.events == EVENTS
    assert outcome.records == EVENTS + EVENTS // 10
    assert outcome.database_restarts == 2
    assert sum(outcome.strikes.values()) >= 4
    # What a rebalance does to the copy of the offsets is said once, not for each batch in it.
    logs = "".join(log.read_text() for log in tmp_path.glob("worker-*.log"))
    assert logs.count("kafka_offset_copy_failed") < 10 * sum(outcome.strikes.values())
