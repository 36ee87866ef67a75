"""Connections to the reservation database, with every wait bounded.

A pool is opened where it is used, in the worker, after the fork: a connection that two
processes share mixes their answers.
"""

import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg_pool import ConnectionPool

Connection = psycopg.Connection[tuple[Any, ...]]

CONNECT_TIMEOUT_S = 5
# The pool has a connection for each thread: only a database that was away makes anybody wait.
POOL_TIMEOUT_S = 5.0
# Then a new attempt begins with the next request. The pool's own would be up to 16 s apart, and
# who asks in between would be told that a database that is back is away.
RECONNECT_TIMEOUT_S = 2.0
LOCK_TIMEOUT_MS = 2_000
STATEMENT_TIMEOUT_MS = 5_000
# The server bounds its statements, but not when it is frozen itself: then we stop waiting. Longer
# than any of its own bounds, shorter than the time in which a worker has to stop.
ANSWER_TIMEOUT_S = 7.0
# A worker that is frozen inside a transaction must not keep seats locked.
IDLE_IN_TRANSACTION_TIMEOUT_MS = 5_000

SESSION_OPTIONS = " ".join(
    f"-c {name}={value}"
    for name, value in {
        "statement_timeout": STATEMENT_TIMEOUT_MS,
        "lock_timeout": LOCK_TIMEOUT_MS,
        "idle_in_transaction_session_timeout": IDLE_IN_TRANSACTION_TIMEOUT_MS,
        "default_transaction_isolation": "read\\ committed",
        "synchronous_commit": "on",
        "search_path": "public",
        "timezone": "UTC",
    }.items()
)


Result = TypeVar("Result")


class _BoundedConnection(psycopg.Connection[tuple[Any, ...]]):
    """Gives up, and is closed, when the server says nothing for `ANSWER_TIMEOUT_S`."""

    def wait(
        self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None
    ) -> Result:
        if timeout is not None:  # psycopg's own, which it handles itself
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, ANSWER_TIMEOUT_S)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 - there is no public name
            # Whatever comes later answers a question that nobody asks any more.
            self.pgconn.finish()
            raise psycopg.OperationalError("the server did not answer in time") from None


def parameters(application_name: str) -> dict[str, Any]:
    """Return what every connection is opened with, whatever the URL says."""
    return {
        "autocommit": True,
        "application_name": application_name,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "options": SESSION_OPTIONS,
        # A server that vanished without a word is noticed within about ten seconds.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
    }


def connect(url: str, application_name: str) -> Connection:
    """Open one connection.

    Raises:
        psycopg.OperationalError: the server can't be reached.
    """
    return _BoundedConnection.connect(url, **parameters(application_name))


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """One transaction in one pipeline; on an error nothing of it stays.

    BEGIN travels with the first statements and COMMIT with the last, so locks are held for a round
    trip less than with `Connection.transaction`, which waits for each of the two. All results,
    COMMIT's too, have arrived when the block has ended; so an answer is given after the block,
    never inside it.

    Raises:
        psycopg.Error: a statement failed, at the latest at the end of the block.
    """
    try:
        with connection.pipeline():
            connection.execute("BEGIN", prepare=False)
            yield
            connection.execute("COMMIT", prepare=False)
    except BaseException:
        # The pipeline is over, the transaction may be not; a lost connection has ended it.
        if not connection.closed:
            connection.rollback()
        raise


def make_pool(
    url: str, size: int, kind: type[ConnectionPool[Connection]] = ConnectionPool
) -> ConnectionPool[Connection]:
    """Make a closed pool of up to `size` connections, which opens even while Postgres is away."""
    return kind(
        url,
        connection_class=_BoundedConnection,
        kwargs=parameters("reservation-service"),
        min_size=min(2, size),
        max_size=size,
        timeout=POOL_TIMEOUT_S,
        max_waiting=4 * size,
        reconnect_timeout=RECONNECT_TIMEOUT_S,
        check=_still_there,
        name="reservations",
        open=False,
    )


def _still_there(connection: Connection) -> None:
    """Refuse a connection that the server has closed, without a round trip for the others.

    A healthy idle connection has nothing to read; a server that stopped has sent a farewell,
    a killed one an end of file.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if poll.poll(0):
        ConnectionPool.check_connection(connection)
