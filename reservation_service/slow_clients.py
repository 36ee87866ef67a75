"""A gunicorn worker whose threads don't wait for clients that are slow to ask.

gunicorn's threads read the requests themselves: as many half-sent requests as there are threads
would keep everybody else out. Here the worker's event loop gathers a request, and a thread gets it
when its head and its body are there.

Guarantees:
- What isn't there `REQUEST_TIMEOUT_S` after it began is dropped; no thread has seen it.
- Only a body that is announced to be larger than `GATHERED_MAX_BYTES` is read by a thread. There,
  and where an answer is written, a socket on which nothing moves for `STALLED_TIMEOUT_S` is given
  up. (An answer that a client takes byte by byte does hold its thread: on the open Internet let a
  proxy that buffers stand before the service.)
- Nothing waits until a client closes its side.
- When all connections that a worker may have are taken, the one that has been silent for longest
  makes room for a new one.
"""

import errno
import re
import socket
import struct
import time
from concurrent.futures import Future  # noqa: TC003 - read where it is used
from contextlib import suppress
from functools import partial
from itertools import takewhile
from selectors import EVENT_READ
from typing import Any

from gunicorn.http.message import Request  # type: ignore[import-untyped]
from gunicorn.workers.gthread import (  # type: ignore[import-untyped]
    STOP_KEEPALIVE_LINGER,
    TConn,
    ThreadWorker,
)

REQUEST_TIMEOUT_S = 10.0
STALLED_TIMEOUT_S = 5
CLOSING_TIMEOUT_S = 2.0
GATHERED_MAX_BYTES = 98_304
RECEIVED_MAX_BYTES = 65_536
# Of a body that nobody has read gunicorn throws away so much less one to keep a connection.
DRAINED_MAX_BYTES = 65_536
CHUNK_LINE_MAX_BYTES = 1_024

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_LENGTH = re.compile(rb"(?im)^content-length[ \t]*:[ \t]*([0-9]{1,18})[ \t]*\r$")
_CHUNKED = re.compile(rb"(?im)^transfer-encoding[ \t]*:")
_EXPECTS = re.compile(rb"(?im)^expect[ \t]*:[ \t]*100-continue")


class Gathered:
    """What was received of a request, and whether a thread can go on with it.

    This judges nothing: what is no HTTP is there too, and gunicorn's parser refuses it. Each byte
    is looked at about once, however slowly they come.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self._at = 0  # up to here it is understood; in a body of known length: its end
        self._in_head, self._chunked = True, False
        self.wants_continue = False

    @property
    def is_large(self) -> bool:
        """Whether the thread has to read the rest of the body."""
        return len(self.data) >= GATHERED_MAX_BYTES or self._at > GATHERED_MAX_BYTES

    def is_there(self) -> bool:
        """Whether nothing more of the client is needed, or more than is gathered here."""
        if self._in_head and not self._find_body():
            return self.is_large
        if self._chunked:
            return self._chunks_are_there() or self.is_large
        return self.is_large or len(self.data) >= self._at

    def _find_body(self) -> bool:
        head_end = self.data.find(b"\r\n\r\n", max(0, self._at - 3))
        self._at = len(self.data)
        if head_end < 0:
            return False
        head = bytes(self.data[: head_end + 2])
        length = _LENGTH.search(head)
        self._chunked = bool(_CHUNKED.search(head))
        self.wants_continue = bool(_EXPECTS.search(head))
        self._at = head_end + 4 + (int(length[1]) if length and not self._chunked else 0)
        self._in_head = False
        return True

    def _chunks_are_there(self) -> bool:
        while (line_end := self.data.find(b"\r\n", self._at)) >= 0:
            size_text = bytes(self.data[self._at : line_end]).partition(b";")[0]
            if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", size_text.strip()):
                return True
            size = int(size_text, 16)
            if size == 0:
                return self.data.find(b"\r\n\r\n", line_end) >= 0
            chunk_end = line_end + 4 + size
            if GATHERED_MAX_BYTES >= chunk_end > len(self.data):
                return False
            self._at = chunk_end
        return len(self.data) - self._at > CHUNK_LINE_MAX_BYTES


class Worker(ThreadWorker):  # type: ignore[misc]
    """Gathers requests before threads get them."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        # By the time at which they are dropped, the earliest first.
        self._gathering: dict[TConn, tuple[float, Gathered]] = {}
        self._closing: dict[TConn, tuple[float, None]] = {}

    def accept(self, listener: socket.socket) -> None:
        """Take a connection; its first request is gathered like any other."""
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in {errno.EMFILE, errno.ENFILE}:
                raise
            self._make_room()
            return
        self.nr_conns += 1
        if self.nr_conns >= self.worker_connections:
            self._make_room()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            client.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALLED_TIMEOUT_S, 0))
        self._gather(TConn(self.cfg, client, address, listener.getsockname()))

    def on_client_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        """Gather the next request of a connection that was kept alive."""
        if client.fileno() < 0:  # in this very turn of the loop it has made room for another
            return
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self._gather(conn)

    def finish_request(self, conn: TConn, future: "Future[Any]") -> None:
        """Go on with a connection whose request a thread has answered."""
        if future.cancelled() or future.exception() or not future.result():
            self._close(conn)
        elif ahead := conn.parser.unreader.take_buffered():
            self._gather(conn, ahead)
        else:
            super().finish_request(conn, future)

    def murder_pending(self) -> None:
        """Drop what took too long; called at least every second."""
        now_s = time.monotonic()
        for waiting in (self._gathering.items(), self._closing.items()):
            late = takewhile(lambda item: item[1][0] <= now_s, waiting)
            for conn, _ in list(late):
                self._drop(conn)

    def hurry(self) -> None:
        """Stop waiting for requests that haven't come yet: the worker is to end."""
        at_s = time.monotonic() + STOP_KEEPALIVE_LINGER
        for conn, (drop_at_s, gathered) in self._gathering.items():
            self._gathering[conn] = (min(at_s, drop_at_s), gathered)

    def handle_request(self, req: Request, conn: TConn) -> bool:
        """Answer; after a large body, which may not have been wanted, the connection ends.

        gunicorn would end it as well when much of the body is left, but without a word.
        """
        if conn.ends:
            req.force_close()
        return bool(super().handle_request(req, conn))

    def _make_room(self) -> None:
        if self._gathering:
            self._drop(next(iter(self._gathering)))
        elif self.keepalived_conns:
            self._drop(self.keepalived_conns.popleft())

    def _gather(self, conn: TConn, ahead: bytes = b"") -> None:
        conn.sock.setblocking(False)
        gathered = Gathered()
        gathered.data += ahead
        timeout_s = REQUEST_TIMEOUT_S if self.alive else STOP_KEEPALIVE_LINGER
        self._gathering[conn] = (time.monotonic() + timeout_s, gathered)
        self.poller.register(conn.sock, EVENT_READ, partial(self._receive, conn))
        self._receive(conn, conn.sock)

    def _receive(self, conn: TConn, client: socket.socket) -> None:
        if conn not in self._gathering:  # likewise
            return
        gathered = self._gathering[conn][1]
        try:
            received = client.recv(RECEIVED_MAX_BYTES)
        except BlockingIOError:
            received = None
        except OSError:
            received = b""
        if received == b"":
            self._drop(conn)
            return
        gathered.data += received or b""
        if gathered.is_there():
            self.poller.unregister(client)
            del self._gathering[conn]
            conn.init()
            conn.ends = gathered.is_large or len(gathered.data) > DRAINED_MAX_BYTES
            conn.parser.unreader.unread(bytes(gathered.data))
            self.enqueue_req(conn)
        elif gathered.wants_continue:
            gathered.wants_continue = False
            with suppress(OSError):  # what is wrong with it shows when it is read
                client.send(CONTINUE)

    def _close(self, conn: TConn) -> None:
        """Say that nothing more comes, and let the client read it before the connection ends.

        What it still sends is read and thrown away: a reset could overtake our answer.
        """
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
            self.poller.register(conn.sock, EVENT_READ, partial(self._throw_away, conn))
        except (OSError, ValueError):  # it is closed already
            self.nr_conns -= 1
            conn.close()
        else:
            self._closing[conn] = (time.monotonic() + CLOSING_TIMEOUT_S, None)

    def _throw_away(self, conn: TConn, client: socket.socket) -> None:
        if conn not in self._closing:
            return
        try:
            ended = not client.recv(RECEIVED_MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            self._drop(conn)

    def _drop(self, conn: TConn) -> None:
        self._gathering.pop(conn, None)
        self._closing.pop(conn, None)
        with suppress(KeyError, ValueError, OSError):
            self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()
