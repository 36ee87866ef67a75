"""The old way, for comparison only: a booking that calls the data platform over HTTP.

`call_inside` calls it before COMMIT, so a booking fails when the call does. `call_after` calls it
after COMMIT, so the event is gone when the call fails. Both are kind to it: connections are kept,
and the time limit is short.

`python -m benchmarks.old_way PORT DELAY_MS` is the platform: it commits each event to the analysts'
database before it answers.
"""

import http.client
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import psycopg
import structlog

from devstack.processes import DevstackError
from reservation_service import booking, problems, sql
from reservation_service.database import Connection
from reservation_service.idempotency import Answer

HOST = "127.0.0.1"
PORT_VARIABLE = "BENCH_PLATFORM_PORT"
TIMEOUT_S = 1.0
ERRORS = (OSError, http.client.HTTPException)

WITHOUT_EVENT = "bench_book_seats_without_event"
TABLE = "CREATE TABLE bench_received (reservation_id text PRIMARY KEY, payload json)"
RECEIVE = "INSERT INTO bench_received VALUES (%s, %s) ON CONFLICT DO NOTHING"

log = structlog.get_logger(__name__)
_own = threading.local()


def call_inside() -> None:
    """Let a booking call the platform in the midst of its transaction."""
    no_event()
    book = booking.book

    def book_and_tell(connection: Connection, *order: Any) -> Answer:
        with connection.transaction():
            answer = book(connection, *order)
            try:
                _deliver(answer.body)
            except ERRORS:
                raise problems.unavailable("The data platform does not answer.") from None
        return answer

    _replace(booking, "book", book_and_tell)


def call_after() -> None:
    """Let a booking call the platform when it is committed."""
    no_event()
    book = booking.book

    def book_and_tell(connection: Connection, *order: Any) -> Answer:
        answer = book(connection, *order)
        try:
            _deliver(answer.body)
        except ERRORS as error:
            log.warning("an event is lost", error=type(error).__name__)
        return answer

    _replace(booking, "book", book_and_tell)


def no_event() -> None:
    """Let a booking write no event at all: what the outbox row costs shows beside it."""
    _replace(sql, "BOOK_SEATS", sql.BOOK_SEATS.replace("book_seats", WITHOUT_EVENT))


def make_function(owner_url: str) -> None:
    """Put the variant of `book_seats` that writes no event into the database."""
    with psycopg.connect(owner_url) as connection:
        row = connection.execute("SELECT pg_get_functiondef('book_seats'::regproc)").fetchone()
        assert row  # noqa: S101 - the migrations make it
        text, removed = re.subn(r"INSERT INTO outbox .*?;", "", str(row[0]), flags=re.DOTALL)
        if removed != 1:
            raise DevstackError("book_seats is not written as this benchmark knows it")
        connection.execute(text.replace("book_seats", WITHOUT_EVENT).encode())


def _replace(module: object, name: str, function: object) -> None:
    setattr(module, name, function)


def _deliver(payload: bytes) -> None:
    """POST an event on this thread's connection.

    Raises:
        OSError: the platform can't be reached, or has not answered in time.
        http.client.HTTPException: it answered with an error, or not as HTTP asks for.
    """
    connection: http.client.HTTPConnection | None = getattr(_own, "connection", None)
    if connection is None:
        connection = http.client.HTTPConnection(
            HOST, int(os.environ[PORT_VARIABLE]), timeout=TIMEOUT_S
        )
        _own.connection = connection
    try:
        connection.request("POST", "/events", payload, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
    except ERRORS:
        connection.close()
        raise
    if answer.status != http.HTTPStatus.NO_CONTENT:
        raise http.client.HTTPException(f"status {answer.status}")


class _Platform(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    delay_s = 0.0

    def do_POST(self) -> None:
        payload = self.rfile.read(int(self.headers["Content-Length"]))
        if not hasattr(_own, "database"):
            _own.database = psycopg.connect(
                os.environ["ANALYTICS_OWNER_DATABASE_URL"], autocommit=True
            )
        reservation_id = msgspec.json.decode(payload)["reservation_id"]
        _own.database.execute(RECEIVE, [reservation_id, payload.decode()])
        time.sleep(self.delay_s)
        self.send_response(http.HTTPStatus.NO_CONTENT)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _serve(port: int, delay_ms: int) -> None:
    _Platform.delay_s = delay_ms / 1_000
    ThreadingHTTPServer((HOST, port), _Platform).serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
