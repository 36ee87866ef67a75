"""Commands, settings, exit codes and what the worker tells over HTTP."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from data_platform import config
from data_platform.health import STUCK_AFTER_S, Health
from devstack.state import free_port
from tests.data_platform.conftest import Platform
from tests.data_platform.histories import event, history
from tests.waiting import wait_until

MINIMUM = {
    "ANALYTICS_DATABASE_URL": "postgresql://u:secret@h/d",
    "KAFKA_BOOTSTRAP_SERVERS": "h:1",
}


def settings(monkeypatch: pytest.MonkeyPatch, **more: str) -> config.Settings:
    """The settings that an environment makes."""
    for name, value in (MINIMUM | more).items():
        monkeypatch.setenv(name, value)
    return config.load(config.Settings)


def test_status_is_in_the_promised_shape_and_lag_comes_and_goes(platform: Platform) -> None:
    assert platform.status()["lag_rows"] == 0
    events = history(40, seed=31)
    platform.produce(events)
    behind = platform.status()
    assert set(behind) >= {"partitions", "lag_rows", "lag_seconds", "dead_letters"}
    assert behind["lag_rows"] == len(events)
    assert 0 < behind["lag_seconds"] < 60
    worker = platform.worker()
    platform.wait_for_offsets(len(events))
    level = platform.status()
    assert (level["lag_rows"], level["lag_seconds"], level["dead_letters"]) == (0, 0, 0)
    assert [set(partition) for partition in level["partitions"]] == [
        {"topic", "partition", "next_offset", "end_offset", "lag_rows"}
    ] * 7  # with the catalogue's
    assert sum(p["next_offset"] for p in level["partitions"]) == len(events)
    assert worker.stop() == 0


def test_lag_reaches_zero_behind_transaction_markers(platform: Platform) -> None:
    producer = Producer(
        {"bootstrap.servers": platform.bootstrap_servers, "transactional.id": platform.topic}
    )
    producer.init_transactions(30)
    worker = platform.worker()
    loaded = 0
    for number, commit in enumerate([True, False, True, False], start=1):
        producer.begin_transaction()
        one = event(f"r-{number}")
        producer.produce(platform.topic, one.value, one.key)
        producer.flush(10)
        if commit:
            producer.commit_transaction(10)
            loaded += 1
        else:
            producer.abort_transaction(10)
    wait_until(
        lambda: (
            (found := platform.status())["lag_rows"] == 0
            and sum(p["next_offset"] for p in found["partitions"]) == 8
        ),
        30,
        "lag 0 at four records and four markers",
    )
    assert len(platform.facts()) == loaded
    assert worker.alive


def test_deleted_records_that_were_never_loaded_stop_the_partition(platform: Platform) -> None:
    platform.produce_raw([(b"k", b"lost")] * 5, partition=2)
    admin = AdminClient({"bootstrap.servers": platform.bootstrap_servers})
    for future in admin.delete_records([TopicPartition(platform.topic, 2, 3)]).values():
        future.result(10)
    worker = platform.worker()
    wait_until(lambda: "partition_stopped" in worker.log.read_text(), 30, "the worker to say so")
    others = history(60, seed=32)
    for partition in (0, 1, 3, 4, 5):
        platform.produce_raw([(one.key, one.value) for one in others], partition)
    platform.wait_for_offsets(5 * len(others))

    answer = platform.command("status", "--json")
    found = json.loads(answer.stdout)
    assert answer.returncode == 1
    assert "records 0 to 2 were deleted" in found["problems"][0]
    assert found["partitions"][2]["next_offset"] == 0
    assert worker.alive


def test_migrate_brings_an_empty_database_up_to_date(platform: Platform) -> None:
    assert platform.command("migrate").returncode == 0
    away = platform.command(
        "migrate", ANALYTICS_OWNER_DATABASE_URL="postgresql://u:secret@127.0.0.1:1/d"
    )
    assert away.returncode == 1
    assert "secret" not in away.stderr


def test_health_and_metrics_are_served(platform: Platform) -> None:
    port = free_port()
    worker = platform.worker(METRICS_PORT=str(port))
    platform.produce([event(), event()])
    platform.produce_raw([(None, b"bad")])
    platform.wait_for_offsets(3)

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    assert json.loads(get("/healthz"))["status"] == "alive"
    wait_until(lambda: "data_platform_events_total 2.0" in get("/metrics"), 5, "the counter")
    assert "data_platform_dead_letters_total 1.0" in get("/metrics")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get("/other")
    assert worker.stop(how=signal.SIGINT) == 0


def test_a_loop_that_stands_still_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health()
    now = health._beat_at
    monkeypatch.setattr("data_platform.health.time.monotonic", lambda: now + STUCK_AFTER_S - 1)
    assert health.report()[0] == 200
    monkeypatch.setattr("data_platform.health.time.monotonic", lambda: now + STUCK_AFTER_S + 1)
    assert health.report()[0] == 503


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ANALYTICS_DATABASE_URL": ""}, "ANALYTICS_DATABASE_URL is not set"),
        ({"ANALYTICS_DATABASE_URL": "secret words"}, "ANALYTICS_DATABASE_URL has a wrong value"),
        ({"KAFKA_BOOTSTRAP_SERVERS": ""}, "KAFKA_BOOTSTRAP_SERVERS is not set"),
        ({"METRICS_PORT": "70000"}, "METRICS_PORT has a wrong value"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL has a wrong value"),
        ({"KAFKA_PROPERTIES_FILE": "/nowhere"}, "KAFKA_PROPERTIES_FILE: expected a readable"),
        ({"ANALYTICS_DATABASE_URL_FILE": "/nowhere"}, "ANALYTICS_DATABASE_URL_FILE: expected"),
    ],
)
def test_wrong_configuration_is_one_clear_line_and_exit_code_2(
    variables: dict[str, str], message: str
) -> None:
    answer = _run(MINIMUM | variables)
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1
    assert message in answer.stderr
    assert "secret" not in answer.stderr


@pytest.mark.parametrize(
    "line",
    [
        "enable.auto.commit=true",
        "auto.offset.reset = latest",
        "isolation.level=read_uncommitted",
        "enable.partition.eof=false",
        "partition.assignment.strategy=range",
        "group.id=mine",
        "group.instance.id=one",
        "bootstrap.servers=h:1",
        "no equals sign",
        "not.a.property=1",
    ],
)
def test_unsafe_kafka_properties_are_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text(f"# ours\n\nsecurity.protocol=plaintext\n{line}\n")
    answer = _run(MINIMUM | {"KAFKA_PROPERTIES_FILE": str(file)})
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1
    assert "KAFKA_PROPERTIES_FILE" in answer.stderr


def test_safe_kafka_properties_reach_librdkafka(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "kafka.properties"
    file.write_text("session.timeout.ms=7000\nenable.auto.commit=false\n")
    properties = settings(monkeypatch, KAFKA_PROPERTIES_FILE=str(file)).consumer_properties()
    assert properties["session.timeout.ms"] == "7000"
    assert properties["group.id"] == "data-platform"


def test_a_secret_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("postgresql://u:from-file@h/d\n")
    found = settings(monkeypatch, ANALYTICS_DATABASE_URL="", ANALYTICS_DATABASE_URL_FILE=str(file))
    assert found.analytics_database_url.get_secret_value() == "postgresql://u:from-file@h/d"
    assert "from-file" not in repr(found)


def test_an_empty_file_is_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("\n")
    answer = _run(
        MINIMUM | {"ANALYTICS_DATABASE_URL": "", "ANALYTICS_DATABASE_URL_FILE": str(file)}
    )
    assert answer.returncode == 2
    assert answer.stderr == "data-platform: ANALYTICS_DATABASE_URL_FILE: the file is empty\n"


def test_asked_to_end_while_it_still_imports_it_ends_well(tmp_path: Path) -> None:
    # A library that takes long to import, and says so.
    (tmp_path / "click.py").write_text(
        "import sys, time\nprint('importing', flush=True)\ntime.sleep(20)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "data_platform", "run"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
    ) as early:
        assert early.stdout is not None
        assert early.stdout.readline() == b"importing\n"
        early.terminate()
        assert early.wait(10) == 0


def test_commands_are_offered_and_want_a_configuration() -> None:
    answer = _run({}, "--help")
    assert answer.returncode == 0
    for command in ("migrate", "run", "status", "doctor", "dead-letters", "report"):
        assert command in answer.stdout
    assert _run({}, "--version").returncode == 0
    assert _run({}, "doctor").returncode == 2


def test_every_log_line_is_a_json_object(platform: Platform) -> None:
    worker = platform.worker(LOG_LEVEL="debug")
    platform.produce_raw([(None, b"bad")])
    platform.wait_for_offsets(1)
    assert worker.stop() == 0
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    assert {"started", "partitions_placed", "dead_letters", "stopped"} <= {
        line["event"] for line in lines
    }
    assert platform.database.loader_url.split(":")[2].split("@")[0] not in worker.log.read_text()


@pytest.mark.parametrize("arguments", [["nonsense"], ["rebuild"], ["run", "--nonsense"]])
def test_wrong_usage_is_told_in_one_line_and_exits_2(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_platform", *arguments],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr


WORKER_THAT_FAILS = """
from data_platform import __main__ as command

class Worker:
    def __init__(self, *_, **__): pass
    def run(self): raise KeyError("customer-4711")

command.Worker = Worker
command.main(["run"])
"""


def test_a_fault_of_ours_is_told_with_its_place_and_without_what_it_quotes() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", WORKER_THAT_FAILS],
        env=os.environ | {**MINIMUM, "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert answer.returncode == 1
    fault = json.loads(answer.stderr.splitlines()[-1])
    assert (fault["level"], fault["cause"]) == ("critical", "KeyError")
    assert fault["where"][-1].startswith("<string>:")
    assert "customer-4711" not in answer.stderr


def _run(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_platform", *(arguments or ("run",))],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
