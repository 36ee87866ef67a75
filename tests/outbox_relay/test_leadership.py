"""The cursor moves by compare-and-swap: who is no longer the leader changes nothing."""

from dataclasses import replace

import psycopg
import pytest

from outbox_relay import leadership
from outbox_relay.leadership import LostLeadershipError, RefusedError, Term
from tests.databases import ReservationDatabase

DELIVERY = "at_least_once"


def test_a_former_leader_can_not_move_the_cursor(reservation_database: ReservationDatabase) -> None:
    url = reservation_database.relay_url
    with leadership.connect(url) as old, leadership.connect(url) as new:
        former = Term.begin(old, "r", DELIVERY)
        leader = Term.begin(new, "r", DELIVERY)
        with pytest.raises(LostLeadershipError):
            former.advance(replace(former.position, published_snapshot="9:9:"), rows=1)
        leader.advance(replace(leader.position, published_snapshot="5:5:"), rows=1)
        assert Term.begin(new, "r", DELIVERY).position.published_snapshot == "5:5:"


def test_the_cursor_moves_only_from_the_position_that_the_term_wrote_last(
    reservation_database: ReservationDatabase,
) -> None:
    with leadership.connect(reservation_database.relay_url) as connection:
        term = Term.begin(connection, "r", DELIVERY)
        connection.execute("UPDATE outbox_relay_cursor SET published_snapshot = '7:7:'")
        with pytest.raises(LostLeadershipError):
            term.advance(replace(term.position, published_snapshot="9:9:"), rows=1)


def test_one_session_holds_the_lock_of_a_name_until_it_ends(
    reservation_database: ReservationDatabase,
) -> None:
    url = reservation_database.relay_url
    with leadership.connect(url) as second:
        with leadership.connect(url) as first:
            assert leadership.try_lock(first, "r")
            assert not leadership.try_lock(second, "r")
            assert leadership.try_lock(second, "another")
        assert leadership.try_lock(second, "r")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("system_identifier = system_identifier + 1", "another server"),
        ("database_oid = '1'", "another database"),
        ("timeline = '0000000A'", "another timeline"),
        ("wal_lsn = 'FFFF/0'", "an earlier state"),
        ("published_snapshot = '999999999:999999999:'", "an earlier state"),
    ],
)
def test_a_cursor_of_another_history_is_refused_and_resume_is_named(
    reservation_database: ReservationDatabase, change: str, told: str
) -> None:
    with leadership.connect(reservation_database.relay_url) as connection:
        Term.begin(connection, "r", DELIVERY)
        connection.execute(f"UPDATE outbox_relay_cursor SET {change}")  # noqa: S608
        with pytest.raises(RefusedError, match=told) as refusal:
            Term.begin(connection, "r", DELIVERY)
        assert "outbox-relay resume --from-id N" in str(refusal.value)


def test_the_relay_may_read_the_outbox_and_write_nothing_but_its_cursor(
    reservation_database: ReservationDatabase,
) -> None:
    with leadership.connect(reservation_database.relay_url) as connection:
        for statement in (
            "DELETE FROM outbox",
            "UPDATE outbox SET key = 'x'",
            "INSERT INTO outbox (topic, key, payload) VALUES ('concert-reservation', 'k', '{}')",
            "DELETE FROM outbox_relay_cursor",
            "SELECT * FROM reservations",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)
