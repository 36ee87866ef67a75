"""Many HTTP/1.1 clients in one thread, cheap enough to leave the CPU to who is measured.

A client is a generator: it yields a request as bytes, is sent the `Answer`, and ends when it wants
nothing more. Each holds a connection for as long as it lives; an idle one is used again.
"""

import errno
import select
import socket
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# What stands for a status where no answer came: the connection broke, or the time was up.
NO_ANSWER = 0
PIECE_MAX_BYTES = 262_144
POLL_MAX_S = 0.1
WITHOUT_BODY = frozenset({204, 304})


class Answer(NamedTuple):
    """What came of a request; `seconds` count from when the client wanted it sent."""

    status: int
    seconds: float
    head: bytes
    body: bytes


NOTHING = Answer(NO_ANSWER, 0.0, b"", b"")
Client = Generator[bytes, Answer, None]


def request(method: str, path: str, headers: Mapping[str, str], body: str = "") -> bytes:
    """Return a request of HTTP/1.1; the body of a POST is JSON."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", body]).encode()


class Due(NamedTuple):
    """A client that comes so many seconds after the start, whether or not anybody is free."""

    at_s: float
    client: Client


@dataclass(slots=True)
class _Line:
    """A connection, and the client that has it."""

    socket: socket.socket
    client: Client
    request: bytes
    wanted_at: float
    unsent: bytes = b""
    received: bytes = b""
    ends_at: int = 0
    used_before: bool = False


class Crowd:
    """Clients of one address; not more than `lines` at once, the others wait for their turn."""

    def __init__(self, address: tuple[str, int], lines: int) -> None:
        self._address = address
        self._most_lines = lines
        self._poll = select.epoll()
        self._busy: dict[int, _Line] = {}
        self._idle: list[socket.socket] = []
        self._waiting: deque[tuple[float, Client]] = deque()

    def run(self, arrivals: Iterable[Due], timeout_s: float) -> float:
        """Serve all clients to their end; return the seconds it took.

        Those that aren't done after `timeout_s` are told so by an answer without a status.
        """
        began = time.monotonic()
        coming = iter(arrivals)
        upcoming = next(coming, None)
        while upcoming or self._waiting or self._busy:
            now = time.monotonic()
            while upcoming and began + upcoming.at_s <= now:
                self._waiting.append((began + upcoming.at_s, upcoming.client))
                upcoming = next(coming, None)
            while self._waiting and len(self._busy) < self._most_lines:
                self._admit(*self._waiting.popleft())
            if now - began > timeout_s:
                break
            rest_s = began + upcoming.at_s - time.monotonic() if upcoming else POLL_MAX_S
            for number, event in self._poll.poll(max(0.0, min(rest_s, POLL_MAX_S))):
                self._serve(number, event)
        ended = time.monotonic()
        self._give_up()
        return ended - began

    def _give_up(self) -> None:
        for line in list(self._busy.values()):
            self._hang_up(line)
        for open_socket in self._idle:
            open_socket.close()
        self._idle.clear()
        while self._waiting:  # who never got a line has no answer either
            wanted_at, client = self._waiting.popleft()
            if next(client, None) is not None:
                _tell(client, Answer(NO_ANSWER, time.monotonic() - wanted_at, b"", b""))
            client.close()
        self._poll.close()

    def _admit(self, wanted_at: float, client: Client) -> None:
        request = next(client, None)
        if request is not None:
            self._begin(client, request, wanted_at, self._idle.pop() if self._idle else None)

    def _begin(
        self, client: Client, request: bytes, wanted_at: float, known: socket.socket | None
    ) -> None:
        line = _Line(known or self._connect(), client, request, wanted_at)
        line.unsent, line.used_before = request, known is not None
        self._busy[line.socket.fileno()] = line
        self._poll.register(line.socket.fileno(), select.EPOLLIN)
        self._send(line)

    def _connect(self) -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if made.connect_ex(self._address) not in {0, errno.EINPROGRESS}:
            made.close()
            raise ConnectionError(f"{self._address} can't be reached")
        return made

    def _serve(self, number: int, event: int) -> None:
        line = self._busy.get(number)
        if line is None:
            return
        if line.unsent and event & select.EPOLLOUT:
            self._send(line)
        elif event & ~select.EPOLLOUT:
            self._receive(line)

    def _send(self, line: _Line) -> None:
        try:
            line.unsent = line.unsent[line.socket.send(line.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._broken(line)
            return
        wanted = select.EPOLLIN | (select.EPOLLOUT if line.unsent else 0)
        self._poll.modify(line.socket.fileno(), wanted)

    def _receive(self, line: _Line) -> None:
        try:
            piece = line.socket.recv(PIECE_MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._broken(line)
            return
        line.received += piece
        if not line.ends_at:
            line.ends_at = _ends_at(line.received)
        if line.ends_at and len(line.received) >= line.ends_at:
            self._answered(line)

    def _answered(self, line: _Line) -> None:
        now = time.monotonic()
        head, _, body = line.received.partition(b"\r\n\r\n")
        answer = Answer(int(head[9:12]), now - line.wanted_at, head, body)
        closes = b"\nconnection: close" in head.lower()
        request = _tell(line.client, answer)
        if request is None or closes:
            self._leave(line, closes=closes)
            if request is not None:
                self._begin(line.client, request, now, None)
            return
        line.request = line.unsent = request
        line.wanted_at, line.received, line.ends_at, line.used_before = now, b"", 0, True
        self._send(line)

    def _broken(self, line: _Line) -> None:
        if line.used_before and not line.received:
            # The server has closed what was idle, as it may: every client tries again then.
            self._leave(line, closes=True)
            self._begin(line.client, line.request, line.wanted_at, None)
        else:
            self._hang_up(line)

    def _hang_up(self, line: _Line) -> None:
        self._leave(line, closes=True)
        _tell(line.client, Answer(NO_ANSWER, time.monotonic() - line.wanted_at, b"", b""))
        line.client.close()

    def _leave(self, line: _Line, *, closes: bool) -> None:
        del self._busy[line.socket.fileno()]
        self._poll.unregister(line.socket.fileno())
        if closes:
            line.socket.close()
        else:
            self._idle.append(line.socket)


def at_once(clients: Iterable[Client]) -> Iterator[Due]:
    """Let all clients come at the start."""
    return (Due(0.0, client) for client in clients)


def _tell(client: Client, answer: Answer) -> bytes | None:
    try:
        return client.send(answer)
    except StopIteration:
        return None


def _ends_at(received: bytes) -> int:
    """Return how many bytes the answer has; 0 when that can't be told yet.

    Raises:
        ValueError: the server didn't say how long its body is.
    """
    head_ends = received.find(b"\r\n\r\n") + 4
    if head_ends < 4:
        return 0
    if int(received[9:12]) in WITHOUT_BODY:
        return head_ends
    head = received[:head_ends].lower()
    _, found, rest = head.partition(b"\ncontent-length:")
    if not found:
        raise ValueError(f"an answer of unknown length: {head[:200]!r}")
    return head_ends + int(rest.partition(b"\r")[0])
