"""Additive changes of events and tables while workers of the old kind go on."""

import json
from typing import Any

from tests.data_platform.concerts import concert_event, record
from tests.data_platform.conftest import Platform
from tests.data_platform.histories import Event, event, expected_facts, expected_states, history
from tests.data_platform.test_outages import said


def grown(one: Event) -> Event:
    """The same event as a later service may write it: with fields that nobody knows yet."""
    envelope: dict[str, Any] = json.loads(one.value)
    envelope["partitionkey"] = "x"
    data = envelope["data"]
    data["channel"] = {"name": "box office", "till": [1, 2, 3]}
    data["concert"]["genre"] = "strings"
    data["performance"]["doors_open_at"] = None
    for seat in data["seats"]:
        seat["view"] = "restricted \\ \u00e9"
    return Event(envelope)


def test_new_fields_and_new_columns_come_while_old_workers_go_on(platform: Platform) -> None:
    before, after = history(60, seed=61), history(60, seed=62)
    worker = platform.worker()
    platform.produce(before)
    platform.wait_for_offsets(len(before))

    # The tables first, as a migration does: nullable columns, and one with a default.
    for table in (
        "fct_reservation_events",
        "fct_reservations",
        "fct_reservation_seats",
        "dim_concerts",
        "dim_performances",
    ):
        platform.execute(
            f"ALTER TABLE analytics.{table} ADD COLUMN channel text,"
            " ADD COLUMN is_test boolean NOT NULL DEFAULT false"
        )
    platform.produce([grown(one) for one in after])
    concert = concert_event(9)
    concert["data"]["performances"][0]["doors_open_at"] = "2027-05-01T17:00:00Z"
    platform.produce_raw([record(concert)], topic=platform.catalogue_topic)
    platform.wait_for_offsets(len(before) + len(after) + 1)

    events = before + after
    assert platform.facts() == expected_facts(events)
    assert platform.states() == expected_states(events)
    assert platform.dead_letters() == []
    assert platform.rows("SELECT 1 FROM analytics.dim_concerts WHERE concert_id = 9") == [(1,)]
    # Not even an outage: the worker never met a statement that failed.
    assert said(worker, "waiting") == 0
    assert worker.stop() == 0


def test_a_worker_of_the_kind_before_the_seats_goes_on_beside_the_new_tables(
    platform: Platform,
) -> None:
    # What a worker of analytics_0001 wrote while 0002 was already there: a state without seats.
    held = event("r-1", 1)
    platform.execute(
        "INSERT INTO analytics.fct_reservations (reservation_id, version, status, customer_id,"
        " concert_id, performance_id, seat_count, amount, currency, created_at, updated_at)"
        " VALUES ('r-1', 1, 'held', 'customer-1', 1, 3, 2, 12000, 'EUR', now(), now())"
    )
    platform.worker()
    after = event("r-1", 2, "reservation.completed")
    platform.produce([held, after])
    platform.wait_for_offsets(2)
    assert platform.states() == [after.state]
    assert platform.facts() == [held.fact, after.fact]
    assert platform.rows("SELECT count(*) FROM analytics.fct_reservation_seats") == [(2,)]
