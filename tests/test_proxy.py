"""The proxy that breaks connections for other tests does what it says."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from devstack.proxy import Traffic
from tests.proxy import Proxy, kafka_requests

QUIET_S = 0.3
DELAY_S = 0.3
PACE_S = 0.01


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client:
            while piece := client.recv(1000):
                client.sendall(piece)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy(lambda: echo) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), 5)


def ask(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    return client.recv(1000)


def test_what_is_cut_is_dropped_and_refused_until_it_is_opened(proxy: Proxy) -> None:
    with connect(proxy) as client:
        assert ask(client, b"one") == b"one"
        proxy.cut()
        assert client.recv(1000) == b""
    with connect(proxy) as client:
        assert client.recv(1000) == b""
    proxy.open()
    with connect(proxy) as client:
        assert ask(client, b"two") == b"two"


def test_what_is_frozen_is_silent_and_goes_on_where_it_was(proxy: Proxy) -> None:
    with connect(proxy) as client:
        assert ask(client, b"one") == b"one"
        proxy.freeze()
        client.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            ask(client, b"two")
        proxy.open()
        client.settimeout(5)
        assert client.recv(1000) == b"two"


@pytest.mark.parametrize("after", [True, False])
def test_it_freezes_at_a_certain_message(proxy: Proxy, *, after: bool) -> None:
    with connect(proxy) as client:
        proxy.freeze_at(lambda piece: piece == b"now", after=after)
        assert ask(client, b"one") == b"one"
        client.settimeout(QUIET_S)
        with pytest.raises(TimeoutError):
            ask(client, b"now")
        assert proxy.frozen
        if not after:
            # Neither has it left: what is cut now never arrives.
            proxy.cut()
            proxy.open()
            assert client.recv(1000) == b""
        else:
            proxy.open()
            client.settimeout(5)
            assert client.recv(1000) == b"now"


def test_it_counts_bytes_and_round_trips(proxy: Proxy) -> None:
    with connect(proxy) as client, connect(proxy) as other:
        for _ in range(3):
            assert ask(client, b"one") == b"one"
        assert ask(other, b"three") == b"three"
        assert proxy.traffic == Traffic(asked_bytes=14, answered_bytes=14, round_trips=4)


def test_what_is_slow_takes_a_delay_each_way(proxy: Proxy) -> None:
    with connect(proxy) as client:
        assert ask(client, b"one") == b"one"
        proxy.slow(DELAY_S)
        began = time.monotonic()
        assert ask(client, b"two") == b"two"
        assert 2 * DELAY_S <= time.monotonic() - began < 3 * DELAY_S


def test_pieces_sent_one_after_the_other_are_on_their_way_at_once(proxy: Proxy) -> None:
    sent_s: list[float] = []

    def send() -> None:
        for number in range(60):
            sent_s.append(time.monotonic())
            client.sendall(bytes([number]))
            threading.Event().wait(PACE_S)

    proxy.slow(DELAY_S / 2)
    with connect(proxy) as client:
        sender = threading.Thread(target=send)
        sender.start()
        for number in range(60):
            assert client.recv(1) == bytes([number])
            assert DELAY_S <= time.monotonic() - sent_s[number] < 1.5 * DELAY_S
        sender.join()


def test_much_takes_one_delay_and_not_one_for_each_piece(proxy: Proxy) -> None:
    much = bytes(range(256)) * 12_000
    proxy.slow(DELAY_S)
    with connect(proxy) as client:
        began = time.monotonic()
        sender = threading.Thread(target=client.sendall, args=(much,))
        sender.start()
        found = b""
        while len(found) < len(much):
            found += client.recv(1_000_000)
            if len(found) > len(much) / 2:  # what comes quickly now stays behind what was slow
                proxy.open()
        assert time.monotonic() - began < 5 * DELAY_S
        assert found == much
        sender.join()


def test_what_is_on_its_way_is_lost_by_a_cut_and_by_the_end_of_the_proxy(proxy: Proxy) -> None:
    with connect(proxy) as client, connect(proxy) as other:
        assert ask(client, b"one") == ask(other, b"one") == b"one"
        proxy.slow(60)
        client.sendall(b"two")
        proxy.cut()
        assert client.recv(1000) == other.recv(1000) == b""


def test_every_request_of_a_piece_is_seen() -> None:
    def request(api_key: int) -> bytes:
        return (8).to_bytes(4) + api_key.to_bytes(2) + bytes(6)

    assert list(kafka_requests(request(3) + request(1))) == [3, 1]
