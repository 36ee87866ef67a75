"""What a wrong configuration is told: exit 2 and one line that names the variable."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = {
    "OUTBOX_RELAY_DATABASE_URL": "postgresql://relay:secret-word@127.0.0.1:1/none",
    "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
}


def relay(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outbox_relay", *arguments],
        env={**GOOD, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OUTBOX_RELAY_DATABASE_URL", ""),
        ("KAFKA_BOOTSTRAP_SERVERS", ""),
        ("OUTBOX_RELAY_NAME", "with space"),
        ("OUTBOX_RELAY_TRANSACTION_TIMEOUT_MS", "60000"),
        ("OUTBOX_RELAY_RETENTION_HOURS", "-1"),
        ("OUTBOX_RELAY_DELIVERY", "at_most_once"),
        ("OUTBOX_RELAY_DATABASE_URL", "postgres//relay:secret-word@127.0.0.1/x"),
        ("OUTBOX_RELAY_DATABASE_URL", "postgresql://relay:secret-word@127.0.0.1:99999/x"),
        ("OUTBOX_RELAY_DATABASE_URL", "postgresql://relay:secret-word@127.0.0.1:port/x"),
        ("OUTBOX_RELAY_POLL_INTERVAL_MS", "10000"),
        ("METRICS_PORT", "70000"),
        ("LOG_LEVEL", "LOUD"),
        ("OUTBOX_RELAY_CHUNK_MAX_ROWS", "0"),
    ],
)
def test_a_wrong_variable_is_named_in_one_line(variable: str, value: str) -> None:
    done = relay("run", **{variable: value})
    assert done.returncode == 2
    assert variable in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "secret-word" not in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "no.such.property=1",
        "linger.ms=soon",
        "acks=1",
        "request.required.acks=0",
        "enable.idempotence=false",
        "message.timeout.ms=1000",
        "partitioner=random",
        "transactional.id=x",
        "no equals sign",
    ],
)
def test_an_unsafe_kafka_property_is_refused(tmp_path: Path, line: str) -> None:
    properties = tmp_path / "kafka.properties"
    properties.write_text(f"# TLS\nsocket.timeout.ms=1000\n{line}\n")
    done = relay("run", KAFKA_PROPERTIES_FILE=str(properties))
    assert done.returncode == 2
    assert "KAFKA_PROPERTIES_FILE" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_database_url_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://relay:file-word@127.0.0.1:1/none\n")
    done = relay("status", OUTBOX_RELAY_DATABASE_URL="", OUTBOX_RELAY_DATABASE_URL_FILE=str(secret))
    assert done.returncode == 1
    assert "127.0.0.1" in done.stderr
    assert "file-word" not in done.stderr


def test_a_missing_secret_file_is_named() -> None:
    done = relay(
        "run", OUTBOX_RELAY_DATABASE_URL="", OUTBOX_RELAY_DATABASE_URL_FILE="/does/not/exist"
    )
    assert done.returncode == 2
    assert "OUTBOX_RELAY_DATABASE_URL_FILE" in done.stderr


def test_an_empty_file_is_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("\n")
    done = relay("run", OUTBOX_RELAY_DATABASE_URL="", OUTBOX_RELAY_DATABASE_URL_FILE=str(file))
    assert done.returncode == 2
    assert done.stderr == "outbox-relay: OUTBOX_RELAY_DATABASE_URL_FILE: the file is empty\n"


def test_asked_to_end_while_it_still_imports_it_ends_well(tmp_path: Path) -> None:
    # A library that takes long to import, and says so.
    (tmp_path / "click.py").write_text(
        "import sys, time\nprint('importing', flush=True)\ntime.sleep(20)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "outbox_relay", "run"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
    ) as early:
        assert early.stdout is not None
        assert early.stdout.readline() == b"importing\n"
        early.terminate()
        assert early.wait(10) == 0


def test_help_and_version_need_no_configuration() -> None:
    assert relay("--help").returncode == 0
    assert relay("--version").stdout.startswith("outbox-relay, version ")


@pytest.mark.parametrize("arguments", [["no-such-command"], ["resume"], ["run", "--nonsense"]])
def test_wrong_usage_is_told_in_one_line_and_exits_2(arguments: list[str]) -> None:
    done = relay(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
