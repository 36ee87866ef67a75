"""The customers of a benchmark: every answer is counted, from when it was due."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.crowd import NO_ANSWER, Answer, Client, Crowd, Due, at_once

GET = b"GET /%b HTTP/1.1\r\nHost: here\r\n\r\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.connections = 0
        self.lock = threading.Lock()
        self.waiting, self.go_on = threading.Semaphore(0), threading.Event()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/breaks":
            self.close_connection = True
            return
        if self.path == "/waits":
            self.server.waiting.release()
            self.server.go_on.wait(20)
        status = 304 if self.path == "/unchanged" else 200
        self.send_response(status)
        body = b"x" * 300_000 if self.path == "/large" else b"small"
        if status == 200:
            self.send_header("Content-Length", str(len(body)))
        if self.path == "/last":
            self.send_header("Connection", "close")
        self.end_headers()
        if status == 200:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as started:
        thread = threading.Thread(target=started.serve_forever, args=(0.01,))
        thread.start()
        yield started
        started.go_on.set()
        started.shutdown()
        thread.join()


def ask(answers: list[Answer], *paths: str) -> Client:
    for path in paths:
        answer = yield GET % path.encode()
        answers.append(answer)


def run(server: _Server, *arrivals: Due, lines: int = 10, timeout_s: float = 20) -> float:
    host, port = server.server_address[:2]
    return Crowd((str(host), port), lines).run(arrivals, timeout_s)


def test_each_client_gets_its_own_answers_whole_on_one_connection(server: _Server) -> None:
    answers: list[list[Answer]] = [[] for _ in range(10)]
    paths = ("one", "large", "unchanged", "two")
    run(server, *at_once(ask(mine, *paths) for mine in answers))
    for mine in answers:
        assert [answer.status for answer in mine] == [200, 200, 304, 200]
        assert [len(answer.body) for answer in mine] == [5, 300_000, 0, 5]
    assert server.connections == 10


def test_a_connection_that_is_free_is_used_again_and_a_closed_one_is_not_missed(
    server: _Server,
) -> None:
    answers: list[Answer] = []
    clients = [ask(answers, "one"), ask(answers, "last"), ask(answers, "last", "two")]
    run(server, *at_once(clients), lines=1)
    assert [answer.status for answer in answers] == [200] * 4
    assert server.connections == 3


def test_an_answer_that_never_comes_is_told_as_none(server: _Server) -> None:
    answers: list[Answer] = []
    run(server, *at_once([ask(answers, "breaks", "never asked"), ask(answers, "one")]))
    assert sorted(answer.status for answer in answers) == [NO_ANSWER, 200]
    assert run(server, *at_once([ask(answers, "waits")]), timeout_s=0.2) < 5
    assert answers[-1].status == NO_ANSWER


def test_who_has_to_wait_for_a_line_counts_from_when_he_came(server: _Server) -> None:
    first: list[Answer] = []
    second: list[Answer] = []

    def let_go() -> None:
        server.waiting.acquire(timeout=20)
        threading.Timer(0.3, server.go_on.set).start()

    helper = threading.Thread(target=let_go)
    helper.start()
    run(server, Due(0, ask(first, "waits")), Due(0.01, ask(second, "one")), lines=1)
    helper.join()
    assert first[0].seconds >= 0.3
    assert second[0].seconds >= 0.28, "the wait for the line is his, too"
