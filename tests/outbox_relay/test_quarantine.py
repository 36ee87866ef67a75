"""Events in quarantine: in order, none lost and none doubled, whatever happens at their release."""

import json
import random
from functools import partial

import psycopg
import pytest

from tests.databases import ReservationDatabase
from tests.outbox_relay.conftest import StartRelay
from tests.outbox_relay.scenes import (
    HANDOVER_TIMEOUT_S,
    ExactlyOnceOutbox,
    end_sessions,
    exactly_once_outbox,  # noqa: F401 - the fixture `outbox`
    make_outbox,
    says,
    wait_for_leader,
)
from tests.proxy import BreakableKafka
from tests.waiting import wait_until

pytestmark = pytest.mark.needs_kafka

CHUNK_ROWS = 50
SMALL_CHUNKS = {"OUTBOX_RELAY_CHUNK_MAX_ROWS": str(CHUNK_ROWS)}
STOPS = 4
REFUSED = b'"refused once"'


def put_aside(outbox: ExactlyOnceOutbox) -> str:
    """Let an event of key b be in quarantine that is in no partition any more; return its id.

    To be called while no relay runs: a lane knows its keys by itself.
    """
    with outbox.owner() as connection:
        found = connection.execute(
            "INSERT INTO outbox_relay_quarantine (relay_name, id, topic, key, payload, headers,"
            " error) VALUES (%s, nextval('outbox_id_seq'), %s, 'b', %s, '{}', 'too large')"
            " RETURNING id",
            (outbox.relay_name, outbox.topic, REFUSED.decode()),
        ).fetchone()
    assert found is not None
    return str(found[0])


def quarantined(outbox: ExactlyOnceOutbox) -> int:
    with outbox.owner() as connection:
        found = connection.execute("SELECT count(*) FROM outbox_relay_quarantine").fetchone()
    assert found is not None
    return int(found[0])


def published(outbox: ExactlyOnceOutbox, count: int) -> bool:
    return len(outbox.arrived().get("a", ())) == count


def insert_for(outbox: ExactlyOnceOutbox, key: str, count: int) -> None:
    with outbox.owner() as connection:
        connection.execute(
            "INSERT INTO outbox (topic, key, payload)"
            " SELECT %s, %s, n::text::json FROM generate_series(1, %s) AS n",
            (outbox.topic, key, count),
        )


def test_a_stop_behind_chunks_that_stepped_aside_takes_the_cursor_back_over_no_event(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    put_aside(outbox)
    # Whole chunks of b, which waits, each between some of a.
    with outbox.owner() as connection:
        connection.execute(
            "INSERT INTO outbox (topic, key, payload)"
            " SELECT %s, CASE WHEN (n / %s) %% 9 = 4 THEN 'b' ELSE 'a' END, n::text::json"
            " FROM generate_series(0, 59999) AS n",
            (outbox.topic, CHUNK_ROWS),
        )
    truth = outbox.rows()["a"]
    for stop in range(1, STOPS + 1):
        relay = start_relay(outbox, SMALL_CHUNKS)
        outbox.wait_for(stop * 3_000)
        assert relay.stop() == 0
    assert len(outbox.arrived()["a"]) < len(truth), "the last stop was not in the midst"
    start_relay(outbox)
    wait_until(lambda: outbox.status()["lag_rows"] == 0, 40, "the rest")
    assert outbox.arrived() == {"a": truth}


def test_what_waited_behind_a_released_event_is_not_published_again_after_a_clean_stop(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    for number in (1, 2):
        put_aside(outbox)
        relay = start_relay(outbox)
        wait_for_leader(outbox, relay)
        # A commit of just now keeps the position behind the next chunk from its own for a second.
        outbox.insert("a", "1")
        wait_until(partial(published, outbox, number), 20, "its commit")
        with outbox.owner() as connection, connection.transaction():
            connection.execute(
                "INSERT INTO outbox (topic, key, payload) VALUES (%s, 'b', '\"waits\"')",
                (outbox.topic,),
            )
            connection.execute("UPDATE outbox_relay_quarantine SET released_at = now()")
        wait_until(lambda: quarantined(outbox) == 0, 20, "the release")
        assert relay.stop() == 0
    start_relay(outbox)
    outbox.insert("b", '"after"')
    wait_until(lambda: b'"after"' in outbox.arrived()["b"], 20, "the last one")
    assert outbox.arrived()["b"] == [REFUSED, b'"waits"'] * 2 + [b'"after"']


def test_killed_between_the_release_s_commit_and_its_removal_it_is_not_published_again(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    refused_id = put_aside(outbox)
    insert_for(outbox, "b", 3)
    relay = start_relay(outbox)
    wait_until(lambda: quarantined(outbox) == 4, 20, "all of them to wait")
    with psycopg.connect(outbox.database.owner_url) as in_the_way:
        # In the way of a removal, and not of a change.
        in_the_way.execute("SELECT FROM outbox_relay_quarantine FOR KEY SHARE")
        outbox.succeed("quarantine", "release", refused_id)
        outbox.wait_for(1)
        relay.kill()
        end_sessions(outbox, f"lane {outbox.topic}")
    start_relay(outbox)
    outbox.insert("b", '"after"')
    wait_until(lambda: b'"after"' in outbox.arrived()["b"], 20, "the last one")
    assert outbox.arrived()["b"] == [REFUSED, b"1", b"2", b"3", b'"after"']
    assert quarantined(outbox) == 0


def test_a_release_goes_on_where_a_killed_leader_left_it(
    outbox: ExactlyOnceOutbox, start_relay: StartRelay
) -> None:
    refused_id = put_aside(outbox)
    insert_for(outbox, "b", 3_000)
    leader = start_relay(outbox, SMALL_CHUNKS)
    wait_until(lambda: quarantined(outbox) == 3_001, 20, "all of them to wait")
    standby = start_relay(outbox)
    wait_until(lambda: says(standby, "standing by"), 20, "the second to stand by")
    outbox.succeed("quarantine", "release", refused_id)
    wait_until(lambda: quarantined(outbox) <= 2_500, 20, "a part to be released")
    leader.kill()
    wait_until(lambda: quarantined(outbox) == 0, HANDOVER_TIMEOUT_S, "the other one to go on")
    wait_for_leader(outbox, standby)
    outbox.insert("b", '"after"')
    wait_until(lambda: b'"after"' in outbox.arrived()["b"], 20, "the last one")
    numbers = [str(number).encode() for number in range(1, 3_001)]
    assert outbox.arrived()["b"] == [REFUSED, *numbers, b'"after"']


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
def test_a_refused_event_is_found_where_chunks_are_of_one_row(
    reservation_database: ReservationDatabase,
    breakable_kafka: BreakableKafka,
    start_relay: StartRelay,
    delivery: str,
) -> None:
    outbox = make_outbox(
        reservation_database, breakable_kafka.cluster, config={"max.message.bytes": "2000"}
    )
    pad = random.Random(1).randbytes(3_000).hex()  # noqa: S311 - compression can't make it fit
    with outbox.owner() as connection, connection.transaction():
        for number in range(9):
            connection.execute(
                "INSERT INTO outbox (topic, key, payload) VALUES (%s, %s, %s)",
                (outbox.topic, f"key-{number}", json.dumps([number, pad * (number == 5)])),
            )
    start_relay(outbox, {"OUTBOX_RELAY_CHUNK_MAX_ROWS": "1", "OUTBOX_RELAY_DELIVERY": delivery})
    wait_until(lambda: quarantined(outbox) == 1, 30, "the refused one to step aside")
    wait_until(lambda: len(outbox.arrived()) == 8, 20, "all the others")


def test_an_empty_quarantine_says_so(outbox: ExactlyOnceOutbox) -> None:
    said = outbox.succeed("quarantine", "list")
    assert said == f"no event of the relay {outbox.relay_name} is in quarantine\n"
