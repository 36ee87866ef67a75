"""The one module that writes events: what it refuses, and what it passes on."""

import json
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from reservation_service import outbox
from reservation_service.database import transaction
from tests.databases import ReservationDatabase
from tests.reservation_service.house import House

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
EVENT: dict[str, Any] = {"topic": "concert-reservation", "key": "k", "payload": b'{ "a":1.0}'}


def written(house: House) -> list[dict[str, Any]]:
    return house.execute(
        "SELECT key, payload::text AS payload, headers FROM outbox"
        " WHERE topic = 'concert-reservation' ORDER BY id"
    )


def test_an_event_outside_any_transaction_is_refused(house: House) -> None:
    with house.connect() as connection, pytest.raises(RuntimeError, match="transaction"):
        outbox.write(connection, **EVENT)
    assert written(house) == []


def test_an_event_is_written_in_every_kind_of_transaction(house: House) -> None:
    with house.connect() as connection:
        with connection.transaction():
            outbox.write(connection, **EVENT, headers={"content-type": "ü"})
        with transaction(connection):  # a pipeline, nothing of which has arrived yet
            outbox.write(connection, **EVENT)
        with transaction(connection):
            assert connection.execute("SELECT 1").fetchone() == (1,)
            outbox.write(connection, **EVENT, traceparent=TRACEPARENT)
    with psycopg.connect(house.database.service_url) as connection:
        outbox.write(connection, **EVENT, traceparent="nonsense")
    payload = {"key": "k", "payload": '{ "a":1.0}'}
    headers: list[dict[str, str]] = [
        {"content-type": "ü"}, {}, {"traceparent": TRACEPARENT}, {},
    ]  # fmt: skip
    assert written(house) == [payload | {"headers": each} for each in headers]


def test_an_event_goes_with_its_transaction(house: House) -> None:
    with house.connect() as connection:
        for begin in (psycopg.Connection.transaction, transaction):
            with suppress(ZeroDivisionError), begin(connection):
                outbox.write(connection, **EVENT)
                raise ZeroDivisionError
    assert written(house) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"topic": "unheard-of"}, psycopg.errors.CheckViolation),
        ({"key": ""}, psycopg.errors.CheckViolation),
        ({"payload": json.dumps("x" * 1_000_000).encode()}, psycopg.errors.CheckViolation),
        ({"payload": b"{"}, psycopg.errors.InvalidTextRepresentation),
        ({"payload": b"\xff"}, UnicodeDecodeError),
    ],
)
def test_what_could_never_be_published_is_refused_in_the_writer_s_transaction(
    reservation_database: ReservationDatabase, change: dict[str, Any], error: type[Exception]
) -> None:
    with (
        psycopg.connect(reservation_database.service_url, autocommit=True) as connection,
        pytest.raises(error),
        connection.transaction(),
    ):
        outbox.write(connection, **EVENT | change)


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        (TRACEPARENT, True),
        (TRACEPARENT.replace("00-", "cc-", 1), True),
        (TRACEPARENT.replace("00-", "cc-", 1) + "-later", True),
        (TRACEPARENT.replace("00-", "cc-", 1) + "later", False),
        (TRACEPARENT.replace("00-", "cc-", 1) + "-later\n", False),
        (TRACEPARENT.replace("00-", "cc-", 1) + "-" * 255, False),
        (TRACEPARENT + "\n", False),
        (TRACEPARENT + "-later", False),
        (TRACEPARENT.replace("00-", "ff-", 1), False),
        (TRACEPARENT.upper(), False),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", False),
        (f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01", False),
        (TRACEPARENT[:-1], False),
        ("", False),
        (None, False),
    ],
)
def test_only_a_valid_traceparent_is_passed_on(header: str | None, valid: bool) -> None:  # noqa: FBT001
    assert outbox.valid_traceparent(header) == (header if valid else None)
