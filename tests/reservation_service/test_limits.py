"""Clients that are slow, send too much, or never go away hold up nobody else."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import httpx
import pytest

from reservation_service.serve import CONNECTIONS_PER_WORKER
from reservation_service.slow_clients import GATHERED_MAX_BYTES, Gathered
from tests.reservation_service.conftest import Serve, Served
from tests.reservation_service.house import ADMIN_TOKEN, House, bearer, concert
from tests.waiting import wait_until

# More than there are threads: `--workers 1` has eight.
SLOW_CLIENTS = 40
PROMPT_S = 3.0
ANSWER_MAX_BYTES = 65_536

POST = (
    b"POST /api/reservations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
CHUNKED = POST.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
WHOLE = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
SLOW = {
    "nothing": b"",
    "half a line": b"GET /heal",
    "half a head": WHOLE[:-2],
    "half a body": POST % 100 + b"{",
    "a large body that doesn't come": POST % 4_000_000 + b"{",
    "half a chunk": CHUNKED + b"64\r\n{",
    "a chunk that looks like the last one": CHUNKED + b"64\r\n\r\n0\r\n\r\n",
    "a request and a half": WHOLE + WHOLE[:-2],
    "a body that nobody wants": (POST % 4_000_000).replace(b"reservations", b"concerts") + b"{",
}


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve("--workers", "1")


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def connect(served: Served, sockets: ExitStack, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    sockets.enter_context(closing(client))
    client.sendall(sent)
    return client


def answers(client: socket.socket) -> bytes:
    """All that comes until the server has no more to say."""
    received = b""
    with suppress(ConnectionError):
        while part := client.recv(ANSWER_MAX_BYTES):
            received += part
    return received


def status(client: socket.socket) -> bytes:
    return client.recv(ANSWER_MAX_BYTES).split(b" ")[1]


def test_as_many_slow_clients_as_one_likes_hold_up_nobody(
    served: Served, sockets: ExitStack
) -> None:
    for kind, sent in SLOW.items():
        for _ in range(SLOW_CLIENTS):
            connect(served, sockets, sent)
        for _ in range(3):
            began_s = time.monotonic()
            assert httpx.get(f"{served.url}/api/concerts", timeout=20).status_code == 200
            assert time.monotonic() - began_s < PROMPT_S, kind


def test_who_sends_byte_by_byte_is_dropped_in_the_end_and_who_is_merely_slow_is_answered(
    house: House, served: Served, sockets: ExitStack
) -> None:
    endless = connect(served, sockets, b"GET /healthz HTTP/1.1\r\nX: ")
    order = json.dumps(house.order(house.seat_ids[0])).encode()
    token = bearer("ann")["Authorization"].encode()
    head = (POST % len(order)).replace(b"Host:", b"Authorization: " + token + b"\r\nHost:")
    slow = connect(served, sockets)
    for position in range(0, len(head + order), 50):
        slow.sendall((head + order)[position : position + 50])
        endless.sendall(b"x")
    assert status(slow) == b"201"

    def dropped() -> bool:
        try:
            endless.sendall(b"x")
            endless.setblocking(False)
            return endless.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    wait_until(dropped, 20, "the end of the endless request")


def test_chunks_requests_in_a_row_and_expectations_are_understood(
    house: House, served: Served, sockets: ExitStack
) -> None:
    order = json.dumps(house.order(house.seat_ids[0])).encode()
    token = b"Authorization: " + bearer("ann")["Authorization"].encode() + b"\r\nHost:"
    head = CHUNKED.replace(b"Host:", token)
    chunks = b"".join(b"%x\r\n%c\r\n" % (1, byte) for byte in order) + b"0\r\nX: y\r\n\r\n"
    client = connect(served, sockets, head + chunks)
    assert status(client) == b"201"
    client.sendall(WHOLE * 3 + WHOLE.replace(b"Host", b"Connection: close\r\nHost"))
    assert answers(client).count(b"HTTP/1.1 200") == 4
    expecting = (POST % len(order)).replace(b"Host:", b"Expect: 100-continue\r\n" + token)
    client = connect(served, sockets, expecting)
    assert status(client) == b"100"
    client.sendall(order)
    wait_until(lambda: b" 409 " in client.recv(ANSWER_MAX_BYTES), 20, "the answer")


def test_a_body_that_is_too_large_is_told_so(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=20) as http:
        for size in (70_000, 1_000_000, 5_000_000):
            chunks = iter([b" " * 10_000] * (size // 10_000))
            for body in (b" " * size, chunks):
                answer = http.post("/api/reservations", content=body, headers=bearer("ann"))
                assert (answer.status_code, answer.json()["type"]) == (413, "too-large")
                assert http.get("/healthz").status_code == 200, "on the same connection or not"


def test_the_admin_may_send_what_is_large_and_is_told_when_it_stalls(
    served: Served, sockets: ExitStack
) -> None:
    body: Any = concert(seats=500)
    rows = [{"row": f"a row with a long name, number {n}", "seats": 1} for n in range(3_000)]
    body["performances"][0]["sections"][0]["rows"] += rows
    assert len(json.dumps(body)) > GATHERED_MAX_BYTES
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    answer = httpx.post(f"{served.url}/api/concerts", json=body, headers=admin, timeout=20)
    assert answer.status_code == 201, answer.text
    head = POST.replace(b"reservations", b"concerts") % 1_000_000
    token = b"Authorization: Bearer " + ADMIN_TOKEN.encode() + b"\r\nHost:"
    client = connect(served, sockets, head.replace(b"Host:", token) + b"{")
    assert status(client) == b"400"


@pytest.mark.parametrize(
    ("sent", "there"),
    [
        (WHOLE, True),
        (WHOLE[:-1], False),
        (POST % 3 + b"abc", True),
        (POST % 3 + b"ab", False),
        (POST % GATHERED_MAX_BYTES, True),
        (CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", True),
        (CHUNKED + b"3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\n", True),
        (CHUNKED + b"3\r\nabc\r\n0\r\nX: y\r\n", False),
        (CHUNKED + b"3\r\nabc\r\n0\r\n", False),
        (CHUNKED + b"10\r\nabc\r\n0\r\n\r\n", False),
        (CHUNKED + b"ffffff\r\n", True),
        (CHUNKED + b"-3\r\nabc\r\n", True),
        (CHUNKED + b"0x3\r\nabc\r\n", True),
        (CHUNKED + b"1" * 2_000, True),
        (b"x" * GATHERED_MAX_BYTES, True),
    ],
)
def test_a_request_is_there_when_nothing_more_is_needed_however_it_came(
    sent: bytes,
    there: bool,  # noqa: FBT001
) -> None:
    at_once = Gathered()
    at_once.data += sent
    assert at_once.is_there() == there
    if len(sent) < 10_000:
        bytewise = Gathered()
        found = False
        for byte in sent:
            assert not found, "there too early"
            bytewise.data.append(byte)
            found = bytewise.is_there()
            if found and there:
                break
        assert found == there


def test_more_silent_connections_than_a_worker_takes_keep_nobody_out(
    serve: Serve, sockets: ExitStack
) -> None:
    served = serve("--workers", "1")
    for sent in (b"", WHOLE[:-2]):
        for _ in range(CONNECTIONS_PER_WORKER // 2 + 100):
            connect(served, sockets, sent)
    began_s = time.monotonic()
    kept_alive = connect(served, sockets, WHOLE)
    assert status(kept_alive) == b"200"
    assert httpx.get(f"{served.url}/api/concerts", timeout=20).status_code == 200
    assert time.monotonic() - began_s < PROMPT_S
