"""Settings of the relay: the only place that reads the environment.

An empty variable is an unset one. Each secret may also be given as a file: `<NAME>_FILE`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

# What makes the guarantees; a user's properties file may not contradict it.
GUARANTEED_PRODUCER_PROPERTIES: Mapping[str, str | int | bool] = {
    "acks": "all",
    "enable.idempotence": True,
    "max.in.flight.requests.per.connection": 5,
    # A record is retried until it is acknowledged: with a time limit librdkafka would give up on
    # one record and go on with later ones of the same key.
    "message.timeout.ms": 0,
    # As the Java client, so that every other producer puts a key into the same partition.
    "partitioner": "murmur2",
}
ALIASES = {
    "request.required.acks": "acks",
    "max.in.flight": "max.in.flight.requests.per.connection",
    "delivery.timeout.ms": "message.timeout.ms",
}
REFUSED_PRODUCER_PROPERTIES = frozenset(
    {
        "transactional.id",
        "transaction.timeout.ms",
        "bootstrap.servers",
        "delivery.report.only.error",
    }
)


class ConfigurationError(Exception):
    """The configuration can't be used; the message is one line and names the variable."""


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _postgres_url(value: SecretStr) -> SecretStr:
    try:
        ports = str(conninfo_to_dict(value.get_secret_value()).get("port", ""))
    except psycopg.ProgrammingError:  # its text would show the password
        raise ValueError from None
    # libpq looks at them only when it connects; that would be an outage, and waited for.
    if any(port and not (port.isdigit() and 0 < int(port) < 2**16) for port in ports.split(",")):
        raise ValueError
    return value


class KafkaSettings(BaseSettings):
    """How to reach Kafka, and what this relay is called.

    Each field's name is its variable in lower case, its description what is expected.
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    kafka_bootstrap_servers: Annotated[str, Field(description="brokers like host:9092,host:9092")]
    kafka_properties_file: Annotated[
        Path | None, Field(description="a file of librdkafka properties")
    ] = None
    outbox_relay_name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9._-]{1,100}$",
            description="1 to 100 letters, digits, dots, underscores and hyphens",
        ),
    ] = "reservation-service"
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(_upper),
        Field(description="DEBUG, INFO, WARNING or ERROR"),
    ] = "INFO"

    @property
    def cursor_topic(self) -> str:
        """The compacted topic that belongs to this relay alone."""
        return f"outbox-relay-cursor.{self.outbox_relay_name}"

    def kafka_properties(self) -> dict[str, str]:
        """Return the user's librdkafka properties (TLS, SASL) with the bootstrap servers.

        Raises:
            ConfigurationError: the file can't be read, or would break a guarantee.
        """
        properties = {}
        if self.kafka_properties_file is not None:
            properties = _read_properties(self.kafka_properties_file)
        return {**properties, "bootstrap.servers": self.kafka_bootstrap_servers}


class Settings(KafkaSettings):
    """Everything `run`, `status` and `resume` need."""

    outbox_relay_database_url: Annotated[
        SecretStr,
        AfterValidator(_postgres_url),
        Field(description="a PostgreSQL connection URL like postgresql://user@host:5432/database"),
    ]
    outbox_relay_delivery: Annotated[
        Literal["exactly_once", "at_least_once"],
        Field(description="exactly_once or at_least_once"),
    ] = "exactly_once"
    # Of a killed relay's open transaction: so long it may hold back read_committed readers.
    outbox_relay_transaction_timeout_ms: Annotated[
        int, Field(ge=1_000, le=15_000, description="1000 to 15000 milliseconds")
    ] = 10_000
    outbox_relay_retention_hours: Annotated[
        float, Field(ge=0, le=24 * 366, description="0 to 8784 hours")
    ] = 72
    metrics_port: Annotated[
        int, Field(ge=0, le=65_535, description="a port from 1 to 65535, or 0 for none")
    ] = 0
    metrics_host: Annotated[str, Field(description="an address of this machine")] = "127.0.0.1"
    outbox_relay_chunk_max_rows: Annotated[
        int, Field(ge=1, le=100_000, description="1 to 100000 rows")
    ] = 5_000
    outbox_relay_chunk_max_bytes: Annotated[
        int, Field(ge=1, le=64 * 2**20, description="1 to 67108864 bytes")
    ] = 4 * 2**20
    # Well below the idle_session_timeout of sql.SESSION_OPTIONS.
    outbox_relay_poll_interval_ms: Annotated[
        int, Field(ge=1, le=2_000, description="1 to 2000 milliseconds")
    ] = 22

    # OpenTelemetry reads these two and its others itself; traces are on when one of them is set.
    otel_exporter_otlp_endpoint: Annotated[
        str, Field(pattern=r"^(https?://.+)?$", description="an HTTP(S) URL")
    ] = ""
    otel_exporter_otlp_traces_endpoint: Annotated[
        str, Field(pattern=r"^(https?://.+)?$", description="an HTTP(S) URL")
    ] = ""

    # Set by systemd.
    notify_socket: Annotated[str, Field(description="a socket's path, or @name")] = ""
    watchdog_usec: Annotated[int, Field(ge=0, description="microseconds")] = 0
    watchdog_pid: Annotated[int, Field(ge=0, description="a process id")] = 0

    @property
    def traces_variable(self) -> str | None:
        """The variable that says where spans go; None when traces are off."""
        names = "otel_exporter_otlp_traces_endpoint", "otel_exporter_otlp_endpoint"
        return next((name.upper() for name in names if getattr(self, name)), None)

    @property
    def database_url(self) -> str:
        """The relay's connection string. Holds the password: not for logs."""
        return self.outbox_relay_database_url.get_secret_value()


S = TypeVar("S", bound=KafkaSettings)


def load(settings_class: type[S]) -> S:
    """Read the environment.

    Raises:
        ConfigurationError: a variable is missing or wrong; the message names it.
    """
    try:
        return settings_class(**_secrets_from_files(settings_class))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = str(first["loc"][0])
        expected = settings_class.model_fields[name].description
        what = "is not set" if first["type"] == "missing" else "has a wrong value"
        raise ConfigurationError(f"{name.upper()} {what}: expected {expected}") from None


def _secrets_from_files(settings_class: type[KafkaSettings]) -> dict[str, Any]:
    """Read `<NAME>_FILE` for each secret, as systemd and Docker hand out credentials."""
    values = {}
    for name, field in settings_class.model_fields.items():
        path = os.environ.get(f"{name.upper()}_FILE", "")
        if field.annotation is not SecretStr or not path:
            continue
        if os.environ.get(name.upper()):
            raise ConfigurationError(f"{name.upper()}_FILE: expected only one of it and the other")
        try:
            values[name] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{name.upper()}_FILE: expected a readable text file: {error}"
            ) from None
        if not values[name]:  # libpq would take it for "connect with the defaults"
            raise ConfigurationError(f"{name.upper()}_FILE: the file is empty")
    return values


def _read_properties(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"KAFKA_PROPERTIES_FILE: {error}") from error
    properties = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text[0] in "#!":
            continue
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigurationError(
                f"KAFKA_PROPERTIES_FILE: line {number} of {path} is not name=value"
            )
        properties[name.strip()] = value.strip()
    _refuse_unsafe(properties)
    return properties


def _refuse_unsafe(properties: Mapping[str, str]) -> None:
    for name, value in properties.items():
        guaranteed = GUARANTEED_PRODUCER_PROPERTIES.get(ALIASES.get(name, name))
        if name in REFUSED_PRODUCER_PROPERTIES:
            raise ConfigurationError(f"KAFKA_PROPERTIES_FILE: {name} is set by the relay itself")
        if guaranteed is not None and value.lower() != str(guaranteed).lower():
            raise ConfigurationError(
                f"KAFKA_PROPERTIES_FILE: {name}={value} would break a guarantee;"
                f" it must be {str(guaranteed).lower()}"
            )
