"""What needs real processes: signals, several workers, a database that goes away."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

from benchmarks.bookers import HOST
from benchmarks.crowd import Answer, Client, Crowd, at_once, request
from devstack.postgres import PostgresServer
from devstack.processes import descendants
from tests.conftest import MakePostgresServer, RunProcess
from tests.databases import create_reservation_database
from tests.reservation_service.conftest import Serve
from tests.reservation_service.house import House, bearer, is_ready, open_house
from tests.waiting import wait_until

STOP_TIMEOUT_S = 10.0


@pytest.fixture
def own_server(make_postgres_server: MakePostgresServer) -> PostgresServer:
    """A server that the test may stop."""
    return make_postgres_server()


@pytest.fixture
def own_house(own_server: PostgresServer) -> Iterator[House]:
    with open_house(create_reservation_database(own_server)) as opened:
        yield opened


def open_owner(url: str) -> psycopg.Connection[dict[str, Any]]:
    return psycopg.connect(url, autocommit=True, row_factory=dict_row)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_sigterm_finishes_what_is_in_flight_and_exits_0(
    house: House, serve: Serve, tmp_path: Path
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    served = serve(env={"TMPDIR": str(folder)})
    assert list(folder.iterdir()), "the workers' metrics"
    with (
        psycopg.connect(house.database.owner_url) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        other.execute("SELECT 1 FROM seats FOR UPDATE")
        order = house.order(house.seat_ids[0], confirm=True)
        url = f"{served.url}/api/reservations"
        call = pool.submit(httpx.post, url, json=order, headers=bearer("ann"), timeout=20)
        wait_until(
            lambda: house.execute("SELECT 1 FROM pg_locks WHERE NOT granted"), 10, "the booking"
        )
        served.process.send_signal(signal.SIGTERM)
        # The worker without work ends first; then the signal has reached both.
        wait_until(lambda: "Worker exiting" in served.process.log.read_text(), 10, "the signal")
        other.rollback()
        assert call.result(timeout=20).status_code == 201
    assert served.process.wait(STOP_TIMEOUT_S) == 0
    assert list(folder.iterdir()) == []
    house.check()


def test_a_worker_that_ends_takes_nothing_of_the_others_along(serve: Serve, tmp_path: Path) -> None:
    served = serve("--workers", "2", env={"TMPDIR": str(tmp_path)})
    worker = next(
        pid
        for pid in descendants(served.process.pid)
        if pid != served.process.pid
        and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
        == str(served.process.pid)
    )
    os.kill(worker, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), 20, "the worker's end")
    for _ in range(20):
        assert httpx.get(f"{served.url}/api/concerts", timeout=20).status_code == 200
        assert httpx.get(f"{served.url}/metrics", timeout=20).status_code == 200
    assert served.process.stop() == 0
    assert list(tmp_path.glob("reservation-service-metrics-*")) == []


def test_sigterm_under_load_breaks_no_connection_that_was_taken(serve: Serve) -> None:
    served = serve("--workers", "2")
    broken: list[Exception] = []
    stopped = threading.Event()

    def ask() -> None:
        while not stopped.is_set():
            with httpx.Client(base_url=served.url, timeout=20) as client:
                answered = 0
                try:
                    for answered in range(10):  # noqa: B007 - counts the answers
                        client.get("/api/concerts")
                except httpx.ConnectError:
                    return  # nobody listens any more
                except httpx.TransportError as error:
                    if answered:
                        broken.append(error)
                    return

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    wait_until(lambda: httpx.get(f"{served.url}/healthz"), 20, "load")
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(STOP_TIMEOUT_S) == 0
    stopped.set()
    for thread in threads:
        thread.join(30)
    assert broken == []


def test_sigterm_does_not_wait_for_idle_connections(serve: Serve) -> None:
    served = serve()
    with httpx.Client(base_url=served.url) as kept_alive:
        assert kept_alive.get("/healthz").json() == {"status": "alive"}
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(STOP_TIMEOUT_S) == 0


def test_logs_are_json_lines_and_hold_no_secret(house: House, serve: Serve) -> None:
    served = serve()
    httpx.get(f"{served.url}/api/nothing")
    served.process.stop()
    text = served.process.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {"level", "message", "timestamp"} <= set.intersection(*map(set, lines))
    for name, value in house.environment.items():
        assert value not in text, name


def test_metrics_count_all_workers(house: House, serve: Serve) -> None:
    served = serve("--workers", "2")
    count = 40

    def book(number: int) -> int:
        order = house.order(house.seat_ids[number % 20])
        url = f"{served.url}/api/reservations"
        return httpx.post(url, json=order, headers=bearer("ann"), timeout=30).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(book, range(count)))
    text = ""
    for _ in range(5):
        text = httpx.get(f"{served.url}/metrics").text
        counted = {
            match[1]: int(float(match[2]))
            for match in re.finditer(
                r'reservation_http_requests_total\{method="POST",'
                r'route="/api/reservations",status="(\d+)"\} (\S+)',
                text,
            )
        }
        assert counted == {str(status): statuses.count(status) for status in set(statuses)}
    assert re.search(r'reservation_changes_total\{action="hold",outcome="done"\} 20\.0', text)


def test_it_is_not_ready_before_the_database_is_migrated(house: House, serve: Serve) -> None:
    house.execute("DELETE FROM alembic_version")
    served = serve(wait=False)
    wait_until(lambda: accepts(served.port), 20, "the service to listen")
    assert httpx.get(f"{served.url}/healthz").status_code == 200
    answer = httpx.get(f"{served.url}/readyz")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "migrate" in answer.json()["detail"]


def test_it_stays_ready_when_a_newer_version_has_migrated_the_database(
    house: House, serve: Serve
) -> None:
    # In an upgrade the schema goes first; taking the old service out then would be an outage.
    house.execute("UPDATE alembic_version SET version_num = 'reservations_9999'")
    served = serve()
    assert httpx.get(f"{served.url}/readyz").status_code == 200


def test_it_starts_without_the_database_and_survives_its_crash(
    own_server: PostgresServer,
    own_house: House,
    serve: Serve,
) -> None:
    own_server.stop()
    served = serve(env=own_house.environment, wait=False)
    wait_until(lambda: accepts(served.port), 20, "the service to listen")
    order = own_house.order(own_house.seat_ids[0])

    def book() -> httpx.Response:
        url = f"{served.url}/api/reservations"
        return httpx.post(url, json=order, headers=bearer("ann"), timeout=20)

    def check_away() -> None:
        for answer in (book(), httpx.get(f"{served.url}/readyz", timeout=20)):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.json()["type"] == "unavailable"
        assert httpx.get(f"{served.url}/healthz").status_code == 200

    check_away()
    own_server.start()
    wait_until(lambda: is_ready(served.url), 40, "the service to find the database")
    assert book().status_code == 201
    own_server.kill()
    check_away()
    own_server.start()
    wait_until(lambda: is_ready(served.url), 40, "the service to find the database again")
    assert book().status_code == 409
    assert "Traceback" not in served.process.log.read_text()


def test_a_restart_of_the_database_is_not_seen_by_who_calls_afterwards(
    own_server: PostgresServer, own_house: House, serve: Serve
) -> None:
    served = serve("--workers", "1", env=own_house.environment)
    with ThreadPoolExecutor(4) as pool:
        url = f"{served.url}/api/concerts"
        assert {answer.status_code for answer in pool.map(httpx.get, [url] * 20)} == {200}
        own_server.stop()
        own_server.start()
        assert {answer.status_code for answer in pool.map(httpx.get, [url] * 20)} == {200}


def test_a_restart_of_the_database_under_load_costs_503s_for_its_duration_and_nothing_else(
    own_server: PostgresServer, own_house: House, serve: Serve
) -> None:
    served = serve("--workers", "2", env=own_house.environment)
    answers: list[Answer] = []
    stopped = threading.Event()

    def customer(number: int) -> Client:
        chance = random.Random(number)  # noqa: S311 - which seat he wants
        while not stopped.is_set():
            body = json.dumps(own_house.order(chance.choice(own_house.seat_ids), confirm=True))
            answer = yield request("POST", "/api/reservations", bearer(f"c{number}"), body)
            answers.append(answer)

    def in_order(count: int) -> bool:
        """Whether so many answers came, and the newest so many tell of no trouble."""
        newest = answers[-count:]
        return len(newest) == count and all(answer.status in {201, 409} for answer in newest)

    with ThreadPoolExecutor(1) as pool:
        customers = at_once(customer(number) for number in range(16))
        crowd = pool.submit(Crowd((HOST, served.port), 16).run, customers, 120)
        try:
            wait_until(lambda: in_order(200), 30, "customers")
            own_server.stop()
            wait_until(lambda: answers[-1].status == 503, 30, "the outage to be seen")
            own_server.start()
            wait_until(lambda: in_order(500), 40, "the end of all trouble")
        finally:
            stopped.set()
        crowd.result(30)
    assert {answer.status for answer in answers} == {201, 409, 503}
    told = [answer for answer in answers if answer.status == 503]
    assert all(b"\nretry-after: 1" in answer.head.lower() for answer in told)
    booked = sum(answer.status == 201 for answer in answers)
    with open_owner(own_house.database.owner_url) as owner:
        house = replace(own_house, owner=owner)  # the restart has ended the other connection
        # A COMMIT whose answer the restart cut off may have been one.
        assert booked <= len(house.events()) <= len(house.seat_ids)
        house.check()


def test_the_sweeper_outlives_the_database_and_ends_with_0(
    own_server: PostgresServer, own_house: House, run_process: RunProcess
) -> None:
    sweeper = run_process(
        "reservation_service", "expire-holds", "--every", "0.1", env=own_house.environment
    )

    def lapse() -> None:
        with own_house.connect() as connection:
            connection.execute(
                "INSERT INTO idempotency_keys (caller, operation, key, fingerprint, created_at) "
                "VALUES ('a', 'b', 'c', '', now() - interval '2 days')"
            )

    def swept() -> bool:
        with own_house.connect() as connection:
            return not connection.execute("SELECT 1 FROM idempotency_keys").fetchall()

    lapse()
    wait_until(swept, 20, "the first sweep")
    own_server.stop()
    wait_until(lambda: "away" in sweeper.log.read_text(), 20, "the sweeper to notice")
    own_server.start()
    lapse()
    wait_until(swept, 20, "the sweep after the restart")
    assert sweeper.log.read_text().count("the database is away") == 1
    sweeper.send_signal(signal.SIGTERM)
    assert sweeper.wait(STOP_TIMEOUT_S) == 0


def test_the_service_knows_nothing_of_kafka_or_of_the_other_packages() -> None:
    code = (
        "import sys, reservation_service.app, reservation_service.demo, "
        "reservation_service.expiry, reservation_service.serve; "
        "print(sorted({'confluent_kafka', 'outbox_relay', 'data_platform'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
