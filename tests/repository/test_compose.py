"""docker-compose.yml, read: `make compose-test` runs it where a Docker engine answers."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import data_platform.__main__
import outbox_relay.__main__
import reservation_service.__main__
from tests.repository.variables import variables

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OFFICIAL = re.compile(r"(postgres|apache/kafka|prom/prometheus|grafana/grafana):v?\d+(\.\d+)*$")
OURS = {"service", "relay", "worker"}
COMMANDS: dict[str, click.Command] = {
    "reservation-service": reservation_service.__main__.commands,
    "outbox-relay": outbox_relay.__main__.cli,
    "data-platform": data_platform.__main__.main,
}


def is_ours(service: dict[str, Any]) -> bool:
    return str(service["image"]).startswith("concert-reservation-")


OUR_PROGRAMS = sorted(
    name for name, one in SERVICES.items() if is_ours(one) and one["command"][0] != "python"
)


def test_every_image_is_an_official_one_of_a_pinned_version_or_built_here() -> None:
    assert {one["image"] for one in SERVICES.values() if is_ours(one)} == {
        f"concert-reservation-{part}" for part in OURS
    }
    for name, one in SERVICES.items():
        assert is_ours(one) or OFFICIAL.fullmatch(one["image"]), name
    assert {one["build"]["target"] for one in SERVICES.values() if "build" in one} == OURS


def test_the_images_come_from_one_pinned_python_and_hashed_locks_and_run_as_no_root() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    sources = set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE))
    stages = set(re.findall(r" AS (\S+)$", dockerfile, re.MULTILINE))
    assert sources - stages == {"${PYTHON_IMAGE}"}
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+-slim$", dockerfile, re.MULTILINE)
    for install in re.findall(r"pip .*install .*", dockerfile):
        assert "--require-hashes -r requirements/" in install or "--no-deps dist/" in install
    for lock in re.findall(r"requirements/\w+\.txt", dockerfile):
        assert (ROOT / lock).exists()
    assert stages >= OURS
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE) == ["10001"]


@pytest.mark.parametrize("name", OUR_PROGRAMS)
def test_every_command_exists_with_its_options(name: str) -> None:
    program, *arguments = SERVICES[name]["command"]
    command = COMMANDS[program]
    context = click.Context(command)
    assert isinstance(command, click.Group)
    found = command.get_command(context, arguments[0])
    assert found
    found.make_context(arguments[0], arguments[1:])  # raises where an option is unknown or wrong


@pytest.mark.parametrize("name", OUR_PROGRAMS)
def test_every_variable_exists_and_secrets_come_as_files(name: str) -> None:
    known = variables()
    secrets = {
        variable
        for variable in known
        if re.search(r"_DATABASE_URL$|_SECRET_KEY$|_TOKEN$", variable)
    }
    for variable, value in SERVICES[name].get("environment", {}).items():
        assert variable.removesuffix("_FILE") in known, variable
        assert variable not in secrets, f"{variable} would be seen by whoever may inspect"
        if variable.removesuffix("_FILE") in secrets:
            folder = str(Path(value).parent)
            assert any(f":{folder}:ro" in volume for volume in SERVICES[name]["volumes"]), variable


def test_every_container_is_bounded_unprivileged_and_ends_in_time() -> None:
    for name, one in SERVICES.items():
        limits = one["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= limits.keys(), name
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        assert one["logging"]["options"].keys() == {"max-size", "max-file"}, name
        assert one.get("read_only") or one["image"].startswith("apache/kafka:"), name
    for name in ("service", "sweeper", "relay", "worker"):
        # SIGTERM is answered within ten seconds.
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > 10


def test_only_loopback_ports_are_open_and_what_is_mounted_exists() -> None:
    for name, one in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", [])), name
        for volume in one.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), volume


def test_the_service_starts_without_kafka_and_without_the_data_platform() -> None:
    needed, todo = set(), ["service", "sweeper"]
    while todo:
        name = todo.pop()
        needed.add(name)
        todo += SERVICES[name].get("depends_on", {})
    assert needed == {"service", "sweeper", "migrate-reservations", "reservations-db", "secrets"}
    assert not {"events", "analytics"} & set(SERVICES["service"]["networks"])


def test_three_brokers_keep_three_copies_of_which_two_confirm() -> None:
    brokers = [one for one in SERVICES.values() if one["image"].startswith("apache/kafka:")]
    assert len(brokers) == 3
    for one in brokers:
        settings = one["environment"]
        assert settings["KAFKA_DEFAULT_REPLICATION_FACTOR"] == 3
        assert settings["KAFKA_MIN_INSYNC_REPLICAS"] == 2
        assert settings["KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR"] == 3
        assert settings["KAFKA_TRANSACTION_STATE_LOG_MIN_ISR"] == 2
    assert "--replication-factor 3" in shlex.join(SERVICES["topics"]["command"])
    assert SERVICES["relay"]["deploy"]["replicas"] == 2
    assert SERVICES["worker"]["deploy"]["replicas"] == 3


def test_prometheus_looks_where_the_programs_answer() -> None:
    text = (ROOT / "deploy/docker/prometheus/prometheus.yml").read_text("utf-8")
    for job in yaml.safe_load(text)["scrape_configs"]:
        (target,) = job["dns_sd_configs"]
        (name,) = target["names"]
        port = SERVICES[name]["environment"].get("METRICS_PORT", 8000)
        assert target["port"] == port, name
        assert "monitoring" in SERVICES[name]["networks"], name
