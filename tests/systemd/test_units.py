"""What must hold of the units without starting them: every name in them exists."""

import re
import subprocess
from pathlib import Path

import click
import pytest
from pydantic import SecretStr

import data_platform.__main__
import data_platform.health
import outbox_relay.__main__
import reservation_service.__main__
from tests.repository.variables import variables

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.*"))
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
LASTING = [unit for unit in SERVICES if "\nType=notify\n" in unit.read_text("utf-8")]
COMMANDS: dict[str, click.Group] = {
    "reservation-service": reservation_service.__main__.commands,
    "outbox-relay": outbox_relay.__main__.cli,
    "data-platform": data_platform.__main__.main,
}
SECRETS = "/etc/opt/concert-reservation/secrets/"


def settings(unit: Path) -> list[tuple[str, str]]:
    lines = unit.read_text("utf-8").splitlines()
    return [
        (name, value)
        for name, equals, value in (line.partition("=") for line in lines)
        if equals and not name.startswith("#")
    ]


def values(unit: Path, wanted: str) -> list[str]:
    return [value for name, value in settings(unit) if name == wanted]


def test_every_unit_that_is_to_be_is_there() -> None:
    assert {unit.name for unit in UNITS} == {
        "concert-reservation.target",
        "concert-reservation-migrate.service",
        "data-platform-worker@.service",
        "hardening.conf",
        "outbox-relay.service",
        "reservation-service.service",
        "reservation-service.socket",
        "reservation-service-expire-holds.service",
        "reservation-service-expire-holds.timer",
    }


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_every_line_is_a_section_a_setting_or_a_comment(unit: Path) -> None:
    for line in unit.read_text("utf-8").splitlines():
        assert re.fullmatch(r"|#.*|\[[A-Z][a-z]+\]|[A-Z][A-Za-z]+=.*", line), line


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_every_command_exists_with_its_options(unit: Path) -> None:
    lines = values(unit, "ExecStart")
    assert lines
    for line in lines:
        path, name, *options = line.split()
        assert re.fullmatch(r"/opt/concert-reservation/(current|next)/bin/[a-z-]+", path)
        command = COMMANDS[path.rpartition("/")[2]].commands[name]
        command.make_context(name, options)


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_every_variable_exists_and_every_secret_is_a_credential(unit: Path) -> None:
    known = variables()
    credentials = dict(value.split(":", 1) for value in values(unit, "LoadCredential"))
    used = set()
    for name, value in (line.split("=", 1) for line in values(unit, "Environment")):
        assert name.removesuffix("_FILE") in known or name in known, name
        if value.startswith("%d/"):
            used.add(value.removeprefix("%d/"))
            assert name.endswith("_FILE")
        else:
            assert "DATABASE_URL" not in name
            assert "TOKEN" not in name
    assert used == set(credentials)
    assert all(path == SECRETS + name for name, path in credentials.items())


def test_every_secret_of_a_program_that_runs_here_is_loaded_somewhere() -> None:
    loaded = {value.split(":")[0] for unit in SERVICES for value in values(unit, "LoadCredential")}
    secrets = set()
    for module in (reservation_service.config, outbox_relay.config, data_platform.config):
        for model in vars(module).values():
            for name, field in getattr(model, "model_fields", {}).items():
                if SecretStr.__name__ in str(field.annotation):
                    secrets.add(field.alias or name.upper())
    # An analyst's is for `report`, which no unit runs; the key of before is added while the key
    # is exchanged (docs/operations.md): a unit whose credential has no file doesn't start.
    elsewhere = {"ANALYST_DATABASE_URL", "RESERVATION_SECRET_KEY_PREVIOUS"}
    assert secrets - elsewhere == loaded - {"kafka.properties"}


@pytest.mark.parametrize("unit", LASTING, ids=lambda unit: unit.name)
def test_what_is_to_last_is_started_again_for_ever_unless_its_configuration_is_wrong(
    unit: Path,
) -> None:
    assert values(unit, "Restart") == ["always"]
    assert values(unit, "StartLimitIntervalSec") == ["0"]
    assert values(unit, "RestartPreventExitStatus") == ["2"]
    assert values(unit, "PartOf") == ["concert-reservation.target"]
    assert int(values(unit, "TimeoutStopSec")[0]) > 10  # what the programs promise


def test_relay_and_workers_have_a_watchdog_slower_than_their_own_judgement() -> None:
    seconds = {unit.name: values(unit, "WatchdogSec") for unit in LASTING}
    assert int(seconds["outbox-relay.service"][0]) > 60
    assert int(seconds["data-platform-worker@.service"][0]) > data_platform.health.STUCK_AFTER_S


@pytest.mark.parametrize("script", sorted(DEPLOY.glob("*install.sh")), ids=lambda path: path.name)
def test_the_scripts_are_whole_and_refuse_what_they_do_not_know(script: Path) -> None:
    subprocess.run(["/bin/bash", "-n", str(script)], check=True, timeout=10)
    done = subprocess.run(
        [str(script), "--nonsense"], check=False, capture_output=True, text=True, timeout=10
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
