"""TLS to Postgres (verify-full) and TLS with SCRAM to Kafka, by configuration alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import psycopg
import pytest

from devstack.processes import ConfigurationError
from devstack.stack import Stack
from devstack.steps import Steps
from tests.compatibility.scene import Scene
from tests.compatibility.secure import (
    Authority,
    SecureKafka,
    make_authority,
    secure_postgres,
)
from tests.require import require

pytestmark = [pytest.mark.needs_postgres, pytest.mark.needs_kafka]

COMMAND_TIMEOUT_S = 60.0
OTHER_PASSWORD = "another-password-than-the-right-one"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def stack(authority: Authority) -> Iterator[Stack]:
    with pytest.MonkeyPatch.context() as patch, Steps() as steps:
        # The wheel's is built without TLS.
        patch.setenv("DEVSTACK_POSTGRES", "system")
        patch.setattr(
            "devstack.stack.new_postgres", lambda run, name: secure_postgres(run, name, authority)
        )
        patch.setattr(
            "devstack.stack.new_kafka", lambda run, _name, _brokers: SecureKafka(run, authority)
        )
        with Stack(1, steps) as made:
            properties = made.run.path / "client.properties"
            write(properties, secure(made).client_properties())
            made.environment |= {
                "PGSSLMODE": "verify-full",
                "PGSSLROOTCERT": str(authority.ca),
                "KAFKA_PROPERTIES_FILE": str(properties),
            }
            try:
                made.start()
            except ConfigurationError as error:
                require(available=False, what=str(error))
            yield made


def secure(stack: Stack) -> SecureKafka:
    assert isinstance(stack.kafka, SecureKafka)
    return stack.kafka


def write(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))


def test_the_whole_way_goes_by_tls_and_no_secret_is_logged(stack: Stack) -> None:
    environment = stack.environment
    with pytest.raises(psycopg.OperationalError, match="no pg_hba"):
        psycopg.connect(environment["ANALYST_DATABASE_URL"], sslmode="disable")
    with Scene(stack) as scene:
        scene.command("reservation_service", "seed-demo")
        scene.sweeper("sweeper")
        scene.await_said(scene.relay("relay"), "leading")
        scene.await_said(scene.worker("worker"), "partitions_placed")
        scene.book(scene.services("service"), 60)
        tls = environment["KAFKA_BOOTSTRAP_SERVERS"]
        environment["KAFKA_BOOTSTRAP_SERVERS"] = secure(stack).plain_servers
        findings = scene.audit()
        environment["KAFKA_BOOTSTRAP_SERVERS"] = tls
        logs = "".join(part.log.read_text("utf-8") for part in scene.parts.values())
    assert findings.differences == []
    assert findings.reservations >= 60
    assert secure(stack).password not in logs
    assert not [url for url in environment.values() if "://" in url and url in logs]


@pytest.mark.parametrize(
    ("package", "wrong"),
    # Each wrong once, each program at least once: it is librdkafka that looks.
    [("outbox_relay", "ca"), ("data_platform", "host"), ("outbox_relay", "password")],
)
def test_a_wrong_ca_host_or_password_for_kafka_is_told_in_a_line(
    stack: Stack, tmp_path: Path, package: str, wrong: str
) -> None:
    kafka, file = secure(stack), tmp_path / "client.properties"
    write(
        file,
        kafka.client_properties(
            make_authority(tmp_path / "theirs").ca if wrong == "ca" else None,
            OTHER_PASSWORD if wrong == "password" else "",
        ),
    )
    env = {"KAFKA_PROPERTIES_FILE": str(file)}
    if wrong == "host":
        env["KAFKA_BOOTSTRAP_SERVERS"] = f"localhost:{kafka.brokers[0].port}"
    code, text = refused(stack, package, ("doctor",), env, f"{package}-{wrong}")
    assert code == 1
    assert "kafka" in text.lower()
    assert "Traceback" not in text
    assert OTHER_PASSWORD not in text
    assert kafka.password not in text


PROGRAMS = {
    "reservation_service": ("RESERVATION_OWNER_DATABASE_URL", "migrate"),
    "outbox_relay": ("OUTBOX_RELAY_DATABASE_URL", "status"),
    "data_platform": ("ANALYTICS_OWNER_DATABASE_URL", "migrate"),
}
SAID = {
    "ca": "certificate verify failed",
    "host": "host name",
    "password": "password authentication failed",
}


@pytest.mark.parametrize(("package", "wrong"), list(zip(PROGRAMS, SAID, strict=True)))
def test_a_wrong_ca_host_or_password_for_postgres_ends_a_program_with_a_line(
    stack: Stack, tmp_path: Path, package: str, wrong: str
) -> None:
    variable, command = PROGRAMS[package]
    url = stack.environment[variable]
    right = psycopg.conninfo.conninfo_to_dict(url)["password"]
    env = {}
    if wrong == "ca":
        env["PGSSLROOTCERT"] = str(make_authority(tmp_path / "theirs").ca)
    if wrong == "host":
        env[variable] = url.replace("127.0.0.1", "localhost")
    if wrong == "password":
        env[variable] = url.replace(str(right), OTHER_PASSWORD)
    code, text = refused(stack, package, (command,), env, f"{package}-postgres-{wrong}")
    assert code == 1
    assert SAID[wrong] in text
    assert len(text.splitlines()) == 1
    assert OTHER_PASSWORD not in text
    assert str(right) not in text


def refused(
    stack: Stack, package: str, arguments: tuple[str, ...], env: Mapping[str, str], name: str
) -> tuple[int, str]:
    """Run a command to its end; return its exit code and all that it said."""
    process = stack.program(package, *arguments, name=name, env=env)
    try:
        code = process.wait(COMMAND_TIMEOUT_S)
    finally:
        process.kill()
    return code, process.log.read_text("utf-8")
