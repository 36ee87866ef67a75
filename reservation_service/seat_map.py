"""The seats of a performance, for everybody who looks at them again and again.

Guarantees:
- A tag stands for what is shown: the status of every seat at this moment by Postgres' clock, and
  the version of the concert. So a hold that runs out by the clock alone changes it, and so does a
  change that commits; nobody who writes has anything to do for it.
- A body and its tag come from the same look at the seats. (Else a state that comes back, a hold
  that is cancelled say, would be "not modified" for somebody who was shown what lay between.)

The tag alone costs one statement that returns a letter a seat. Compressed bodies are kept by their
tags: a state that many ask for is written once by each worker. And those who ask while the seats
are being looked at share the next look, in which they see whatever was committed before they asked.
"""

import gzip
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec
from psycopg_pool import ConnectionPool

from reservation_service import catalogue, problems, sql
from reservation_service.catalogue import SeatsAnswer
from reservation_service.database import Connection
from reservation_service.shared_looks import SharedLooks

KEPT_BODIES = 16
COMPRESSION_LEVEL = 5

Look = TypeVar("Look")


class Shown(NamedTuple):
    """A state of the seats: its tag and its JSON, compressed; None for who knows it already."""

    tag: str
    body: bytes | None


class SeatMaps:
    """The latest bodies of a worker; safe to share between its threads."""

    def __init__(self, pool: ConnectionPool[Connection]) -> None:
        self._pool = pool
        self._bodies: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._looks = SharedLooks()

    def show(self, performance_id: int, is_known: Callable[[str], bool]) -> Shown:
        """Return what a performance's seats look like now.

        Raises:
            Problem: 404.
            TimeoutError: somebody else's look, which this one was to share, took too long.
        """
        tag = self._shared(read_tag, performance_id)
        if is_known(tag):
            return Shown(tag, None)
        with self._lock:
            body = self._bodies.get(tag)
        if body is None:
            tag, body = self._shared(read_body, performance_id)
            self._keep(tag, body)
        return Shown(tag, body)

    def _shared(self, read: Callable[[Connection, int], Look], performance_id: int) -> Look:
        def look() -> Look:
            with self._pool.connection() as connection:
                return read(connection, performance_id)

        return self._looks.share((read, performance_id), look)

    def _keep(self, tag: str, body: bytes) -> None:
        with self._lock:
            self._bodies[tag] = body
            while len(self._bodies) > KEPT_BODIES:
                self._bodies.popitem(last=False)


def read_tag(connection: Connection, performance_id: int) -> str:
    """Return the tag of what is shown at this moment.

    Raises:
        Problem: 404.
    """
    wanted = {"performance_id": performance_id}
    found = connection.execute(sql.READ_SEAT_STATES, wanted).fetchone()
    if found is None:
        raise problems.not_found("performance")
    return _tag(performance_id, *found)


def read_body(connection: Connection, performance_id: int) -> tuple[str, bytes]:
    """Return what is shown at this moment, compressed, with its tag.

    Raises:
        Problem: 404.
    """
    tag, seats = look(connection, performance_id)
    return tag, gzip.compress(msgspec.json.encode(seats), COMPRESSION_LEVEL, mtime=0)


def look(connection: Connection, performance_id: int) -> tuple[str, SeatsAnswer]:
    """Return the seats as they are at this moment, with the tag of what is shown.

    Raises:
        Problem: 404.
    """
    with connection.pipeline():
        # Before the seats: a version that is too old only costs a poll its 304.
        wanted = {"performance_id": performance_id}
        version = connection.execute(sql.READ_VERSION_OF_CONCERT, wanted)
        seats = catalogue.read_seats(connection, performance_id)
    (number,) = version.fetchone() or (0,)
    letters = "".join(seat.status[0] for seat in seats.seats)
    return _tag(performance_id, number, letters), seats


def _tag(performance_id: int, version: int, letters: str) -> str:
    told = f"{performance_id} {version} {letters}".encode()
    return hashlib.blake2b(told, digest_size=16).hexdigest()
