"""The short form of `make chaos`: two relays, three brokers, a fault every few seconds."""

from pathlib import Path

import pytest

from chaos import relay
from tests.databases import ReservationDatabase
from tests.outbox_relay.scenes import make_outbox
from tests.proxy import BreakableKafka

pytestmark = pytest.mark.needs_kafka

DURATION_S = 30
EVENTS = 40_000


def test_two_relays_under_random_kills_and_freezes_lose_double_and_reorder_nothing(
    reservation_database: ReservationDatabase, three_brokers: BreakableKafka, tmp_path: Path
) -> None:
    outbox = make_outbox(reservation_database, three_brokers.cluster, partitions=6)
    outcome = relay.run(
        outbox, three_brokers.cluster, tmp_path, seconds=DURATION_S, events=EVENTS, seed=1
    )
    assert outcome.good, outcome
    assert outcome.verdict.committed >= EVENTS
    assert sum(outcome.strikes.values()) >= 6
    # Whoever was killed in the lead has been followed by another.
    assert outcome.terms > outcome.strikes["leading relay killed"] >= 2
