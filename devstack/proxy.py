"""A TCP proxy of one loopback port, to break a connection the ways a network does.

`cut` refuses and drops, `freeze` keeps every connection open and silent (bytes and closes wait
until `open`, as behind a cable that was pulled), `freeze_at` does so at a certain message, `slow`
is a longer way: what is sent arrives so much later, however much else is on its way. A thread a
direction, a second one where it is slow; all of them end with `close`.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self

CONNECT_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 10.0
PIECE_MAX_BYTES = 256 * 1024
# Of a direction; more waits where it comes from, as with a TCP window. 5 ms carry 800 MB/s.
ON_THE_WAY_MAX_BYTES = 4 * 1024 * 1024
KAFKA_HEADER_BYTES = 6  # four of length, two of the API key


@dataclass
class Traffic:
    """What has passed, in all connections; a round trip is an answer that was waited for."""

    asked_bytes: int = 0
    answered_bytes: int = 0
    round_trips: int = 0


class Proxy:
    """Listens on `port` of 127.0.0.1 at once, and forwards to the port that `target` gives.

    `target` is asked at each connection, so the server behind may start later or move.
    """

    def __init__(self, target: Callable[[], int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._refusing, self._closing = threading.Event(), threading.Event()
        self._trigger: Callable[[bytes], bool] | None = None
        self._lets_pass = False
        self._delay_s = 0.0
        self._traffic = Traffic()
        self._asking: set[socket.socket] = set()
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Drop what is connected and refuse what comes, until `open`."""
        self._refusing.set()
        self._drop()

    def freeze(self) -> None:
        """Let nothing pass in either direction, and tell nobody, until `open`."""
        self._flowing.clear()

    def freeze_at(self, message: Callable[[bytes], bool], *, after: bool) -> None:
        """Freeze when a client sends such a message: `after` it has passed, or before."""
        self._trigger, self._lets_pass = message, after

    @property
    def frozen(self) -> bool:
        """Whether nothing passes."""
        return not self._flowing.is_set()

    @property
    def traffic(self) -> Traffic:
        """What has passed so far."""
        with self._lock:
            return replace(self._traffic)

    def slow(self, delay_s: float) -> None:
        """Let everything arrive so much later, in each direction, until `open`."""
        self._delay_s = delay_s

    def open(self) -> None:
        """Forward again; what was frozen goes on where it was."""
        self._trigger, self._delay_s = None, 0.0
        self._refusing.clear()
        self._flowing.set()

    def close(self) -> None:
        """End everything."""
        self._closing.set()
        self._flowing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drop()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(JOIN_TIMEOUT_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        self._flowing.wait()
        try:
            if self._refusing.is_set():
                raise ConnectionRefusedError
            address = ("127.0.0.1", self._target())
            server = socket.create_connection(address, CONNECT_TIMEOUT_S)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._sockets |= {client, server}
        self._start(self._ask, client, server)
        self._start(self._answer, client, server)
        if self._refusing.is_set() or self._closing.is_set():  # `cut` came in between
            self._drop()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        def pass_on(piece: bytes) -> None:
            freezes = self._trigger is not None and self._trigger(piece)
            if freezes:
                self._trigger = None
                # Before the message leaves, so that no answer slips through.
                self.freeze()
            if not freezes or not self._lets_pass:
                self._flowing.wait()
            with self._lock:
                self._traffic.asked_bytes += len(piece)
                self._asking.add(client)
            server.sendall(piece)

        self._pump(client, server, pass_on)

    def _answer(self, client: socket.socket, server: socket.socket) -> None:
        def pass_on(piece: bytes) -> None:
            self._flowing.wait()
            with self._lock:
                self._traffic.answered_bytes += len(piece)
                self._traffic.round_trips += client in self._asking
                self._asking.discard(client)
            client.sendall(piece)

        self._pump(server, client, pass_on)

    def _pump(
        self, source: socket.socket, sink: socket.socket, pass_on: Callable[[bytes], None]
    ) -> None:
        way: _Way | None = None
        with suppress(OSError):
            while piece := source.recv(PIECE_MAX_BYTES):
                if way is None and self._delay_s:
                    # From now on all goes this way, or what comes later would overtake.
                    way = _Way()
                    self._start(self._arrive, way, source, sink, pass_on)
                if way is None:
                    pass_on(piece)
                else:
                    way.put(piece, self._delay_s)
        if way is None:
            self._flowing.wait()
            self._end(source, sink)
        else:
            way.put(b"", self._delay_s)

    def _arrive(
        self,
        way: "_Way",
        source: socket.socket,
        sink: socket.socket,
        pass_on: Callable[[bytes], None],
    ) -> None:
        """Pass on what is on the way when it is due; its end ends the connection."""
        with suppress(OSError):
            while piece := way.take(self._closing):
                pass_on(piece)
        self._flowing.wait()
        self._end(source, sink)
        way.abandon()

    def _drop(self) -> None:
        with self._lock:
            ends = set(self._sockets)
        self._end(*ends)

    def _end(self, *ends: socket.socket) -> None:
        with self._lock:
            self._sockets -= set(ends)
            self._asking -= set(ends)
        for end in ends:
            with suppress(OSError):  # wakes the thread that reads from it
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            # Inside: one not yet started can't be joined, and isn't alive to whoever sorts out.
            thread.start()


class _Way:
    """The pieces of a direction, each until it is due; an empty one is the end."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._abandoned = False
        self._changed = threading.Condition()

    def put(self, piece: bytes, delay_s: float) -> None:
        """Send a piece off as soon as there is room; when nobody takes any more, drop it."""
        due_s = time.monotonic() + delay_s
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned or self._bytes < ON_THE_WAY_MAX_BYTES)
            self._pieces.append((due_s, piece))
            self._bytes += len(piece)
            self._changed.notify_all()

    def take(self, hurry: threading.Event) -> bytes:
        """Return the next piece when it is due, or at once when there is a `hurry`."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces)
            due_s, piece = self._pieces.popleft()
        hurry.wait(max(0.0, due_s - time.monotonic()))
        with self._changed:
            self._bytes -= len(piece)
            self._changed.notify_all()
        return piece

    def abandon(self) -> None:
        """Take no more."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()


def kafka_requests(piece: bytes) -> Iterator[int]:
    """Yield the API key of each request in a piece that begins with one.

    A client may send several at once: whoever looks at the first only misses the others.
    """
    while len(piece) >= KAFKA_HEADER_BYTES:
        yield int.from_bytes(piece[4:KAFKA_HEADER_BYTES])
        piece = piece[4 + int.from_bytes(piece[:4]) :]
