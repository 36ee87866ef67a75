"""Counts the same reservations in five places: told, stored, in the outbox, in Kafka, analysed."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import psycopg
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

TOPIC = "concert-reservation"
KAFKA_TIMEOUT_S = 20.0
READ_TIMEOUT_S = 60.0
STATUSES = ("confirmed", "cancelled", "expired", "held")

RESERVATIONS = "SELECT reservation_id::text, status, version FROM reservations"
OUTBOX = "SELECT payload->>'id' FROM outbox WHERE topic = %s"
ANALYSED = "SELECT reservation_id, status, version FROM analytics.fct_reservations"
FACTS = "SELECT reservation_id || ':' || version FROM analytics.fct_reservation_events"
DOUBLE_SEATS = """
SELECT count(*) FROM (
    SELECT seat_id FROM reservation_seats JOIN reservations USING (reservation_id)
    WHERE status = 'confirmed' GROUP BY seat_id HAVING count(*) > 1
) AS oversold
"""


@dataclass(frozen=True)
class Audit:
    """What each place holds. Reservations as id -> (status, version), events as a set of ids."""

    told: Mapping[str, str]
    stored: Mapping[str, tuple[str, int]]
    analysed: Mapping[str, tuple[str, int]]
    outbox: frozenset[str]
    topic: frozenset[str]
    topic_records: int
    out_of_order: int
    facts: frozenset[str]
    oversold_seats: int

    def differences(self) -> list[str]:
        """Name everything that does not agree; empty when all is well."""
        stored_status = {name: status for name, (status, _) in self.stored.items()}
        checks = {
            "a reservation that a customer was told of is missing or otherwise": dict(self.told)
            != stored_status,
            "an event is missing in the outbox": self.outbox
            != {
                f"{name}:{number}"
                for name, (_, version) in self.stored.items()
                for number in range(1, version + 1)
            },
            "the topic and the outbox differ": self.topic != self.outbox,
            "the facts and the outbox differ": self.facts != self.outbox,
            "the analysts' reservations differ from the stored ones": dict(self.analysed)
            != dict(self.stored),
            "a reservation's events are out of order in the topic": self.out_of_order != 0,
            "a seat is sold twice": self.oversold_seats != 0,
        }
        return [difference for difference, found in checks.items() if found]

    def rows(self) -> list[tuple[str, int, int, Counter[str]]]:
        """Return (place, reservations, events, reservations by status) for a table."""
        return [
            ("told to customers", len(self.told), 0, Counter(self.told.values())),
            (
                "reservations",
                len(self.stored),
                sum(version for _, version in self.stored.values()),
                Counter(status for status, _ in self.stored.values()),
            ),
            ("outbox", _reservations_in(self.outbox), len(self.outbox), Counter()),
            ("Kafka topic", _reservations_in(self.topic), len(self.topic), Counter()),
            (
                "analysts' tables",
                len(self.analysed),
                len(self.facts),
                Counter(status for status, _ in self.analysed.values()),
            ),
        ]


def audit(told: Mapping[str, str], environment: Mapping[str, str]) -> Audit:
    """Read all places. `told` is the status of each reservation as its customer knows it."""
    with psycopg.connect(environment["RESERVATION_OWNER_DATABASE_URL"]) as reservations:
        stored = {row[0]: (row[1], row[2]) for row in reservations.execute(RESERVATIONS)}
        outbox = [row[0] for row in reservations.execute(OUTBOX, (TOPIC,))]
        oversold = reservations.execute(DOUBLE_SEATS).fetchone()
    with psycopg.connect(environment["ANALYST_DATABASE_URL"]) as analytics:
        analysed = {row[0]: (row[1], row[2]) for row in analytics.execute(ANALYSED)}
        facts = [row[0] for row in analytics.execute(FACTS)]
    topic = _event_ids(environment["KAFKA_BOOTSTRAP_SERVERS"])
    return Audit(
        told=told,
        stored=stored,
        analysed=analysed,
        outbox=frozenset(outbox),
        topic=frozenset(topic),
        topic_records=len(topic),
        out_of_order=_out_of_order(topic),
        facts=frozenset(facts),
        oversold_seats=oversold[0] if oversold else 0,
    )


def _out_of_order(event_ids: list[str]) -> int:
    """Count events that come before an earlier version's first appearance in their partition."""
    found = 0
    newest: dict[str, int] = {}
    for event_id in dict.fromkeys(event_ids):
        reservation_id, _, version = event_id.rpartition(":")
        found += int(version) < newest.get(reservation_id, 0)
        newest[reservation_id] = max(int(version), newest.get(reservation_id, 0))
    return found


def _reservations_in(event_ids: frozenset[str]) -> int:
    return len({event_id.rpartition(":")[0] for event_id in event_ids})


def _event_ids(bootstrap_servers: str) -> list[str]:
    """Read the whole topic and return the id of every record, repetitions included."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "devstack-audit",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    try:
        partitions = consumer.list_topics(TOPIC, timeout=KAFKA_TIMEOUT_S).topics[TOPIC].partitions
        ends = {}
        for number in partitions:
            at = TopicPartition(TOPIC, number)
            ends[number] = consumer.get_watermark_offsets(at, timeout=KAFKA_TIMEOUT_S)[1]
        left = {number for number, end in ends.items() if end > 0}
        consumer.assign([TopicPartition(TOPIC, number, OFFSET_BEGINNING) for number in left])
        found: list[str] = []
        deadline_s = time.monotonic() + READ_TIMEOUT_S
        while left:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the end of {TOPIC} was not reached in {READ_TIMEOUT_S:g} s")
            for message in consumer.consume(5_000, timeout=0.5):
                if message.error():
                    raise RuntimeError(f"reading {TOPIC}: {message.error()}")
                found.append(json.loads(message.value() or b"{}")["id"])
            positions = consumer.position([TopicPartition(TOPIC, number) for number in left])
            left -= {at.partition for at in positions if at.offset >= ends[at.partition]}
        return found
    finally:
        consumer.close()
