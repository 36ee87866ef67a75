"""Containers or programs: decided in one place."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from devstack import java, parts
from devstack.kafka import KafkaCluster
from devstack.postgres import PostgresServer
from devstack.processes import ConfigurationError
from devstack.state import Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv("DEVSTACK_HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-engine.sock")
    monkeypatch.delenv("DEVSTACK_CONTAINERS", raising=False)
    with Run() as run:
        yield run


def test_without_an_engine_parts_are_local_programs(run: Run) -> None:
    assert type(parts.new_postgres(run, "one", prefer_containers=True)) is PostgresServer
    assert type(parts.new_kafka(run, "two", prefer_containers=True)) is KafkaCluster


def test_insisting_on_containers_without_an_engine_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVSTACK_CONTAINERS", "1")
    with pytest.raises(ConfigurationError, match="DEVSTACK_CONTAINERS"):
        parts.new_postgres(run, "one")


def test_where_java_is_missing_and_no_engine_answers_a_line_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(java, "missing", lambda: ["Java 17", "Maven"])
    monkeypatch.setattr(java, "can_install", lambda: False)
    with pytest.raises(ConfigurationError, match="Java 17 and Maven: install"):
        parts.new_kafka(run, "kafka").prepare()


def test_an_engine_that_answers_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        engine.listen()
        engine.settimeout(10)

        def answer() -> None:
            connection, _ = engine.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nOK")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        assert parts.engine_answers()
        thread.join(10)
