"""One relay of a name leads, and who no longer does changes nothing."""

import time
from dataclasses import replace

import psycopg
import pytest

from outbox_relay import leadership
from outbox_relay.cursor import Cursor, LostLeadershipError, Store, refuse_another_history
from outbox_relay.leadership import RefusedError
from tests.databases import ReservationDatabase
from tests.waiting import wait_until

DELIVERY = "at_least_once"
TOPIC = "concert-reservation"


def begin(connection: psycopg.Connection) -> tuple[Store, Cursor]:
    """Begin a term as a lane of it does."""
    store = Store(connection, leadership.begin_term(connection, "r"), TOPIC)
    return store, store.load(leadership.examine(connection), DELIVERY).cursor


def moved(cursor: Cursor, snapshot: str) -> Cursor:
    return cursor.step(replace(cursor.position, published_snapshot=snapshot), rows=1)


def test_a_former_leader_can_not_move_the_cursor(reservation_database: ReservationDatabase) -> None:
    url = reservation_database.relay_url
    with leadership.connect(url) as old, leadership.connect(url) as new:
        former, its_cursor = begin(old)
        leader, cursor = begin(new)
        with pytest.raises(LostLeadershipError):
            former.save(moved(its_cursor, "9:9:"), DELIVERY, durably=False)
        leader.save(moved(cursor, "5:5:"), DELIVERY, durably=False)
        assert begin(new)[1].position.published_snapshot == "5:5:"
        with pytest.raises(LostLeadershipError):  # nor can it open a session again
            former.load(leadership.examine(old), DELIVERY)


def test_the_cursor_moves_only_from_the_step_that_the_term_wrote_last(
    reservation_database: ReservationDatabase,
) -> None:
    with leadership.connect(reservation_database.relay_url) as connection:
        store, cursor = begin(connection)
        connection.execute("UPDATE outbox_relay_cursor SET sequence = 7")
        with pytest.raises(LostLeadershipError):
            store.save(moved(cursor, "9:9:"), DELIVERY, durably=False)


def test_one_session_holds_the_lock_of_a_name_until_it_ends(
    reservation_database: ReservationDatabase,
) -> None:
    url = reservation_database.relay_url
    with leadership.connect(url) as second:
        with leadership.connect(url) as first:
            assert leadership.try_lock(first, "r")
            assert not leadership.try_lock(second, "r")
            assert leadership.try_lock(second, "another")
        # The server notices the end of a session a moment later.
        wait_until(lambda: leadership.try_lock(second, "r"), 10, "the lock")


def test_an_answer_is_waited_for_no_longer_than_its_bound(
    reservation_database: ReservationDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leadership, "ANSWER_WITHIN_S", 0.3)
    with leadership.connect(reservation_database.relay_url) as connection:
        began_s = time.monotonic()
        with (
            pytest.raises(psycopg.OperationalError, match="doesn't answer"),
            leadership.answering(connection),
        ):
            connection.execute("SELECT pg_sleep(10)")
        assert time.monotonic() - began_s < 5
        assert connection.closed


def test_a_leader_knows_whether_somebody_fit_stands_by(
    reservation_database: ReservationDatabase,
) -> None:
    url = reservation_database.relay_url
    with leadership.connect(url) as leader, leadership.connect(url) as other:
        standby = leadership.Standby(other, "r")
        assert not leadership.has_fit_standby(leader, "r")
        for fit in (True, True, False, False, True):
            standby.tell(fit=fit)
            assert leadership.has_fit_standby(leader, "r") == fit
        assert not leadership.has_fit_standby(leader, "another")
        assert not leadership.holds(leader, "r")


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
        begin(connection)
        connection.execute(f"UPDATE outbox_relay_cursor SET {change}")  # noqa: S608
        _, cursor = begin(connection)
        server = leadership.examine(connection)
        with pytest.raises(RefusedError, match=told) as refusal:
            refuse_another_history(connection, cursor, server)
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
