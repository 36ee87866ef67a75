"""Settings of the relay: the only place that reads the environment.

An empty variable is an unset one. Each secret may also be given as a file: `<NAME>_FILE`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

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
    {"transactional.id", "bootstrap.servers", "delivery.report.only.error"}
)


class ConfigurationError(Exception):
    """The configuration can't be used; the message is one line and names the variable."""


class _SecretFiles(PydanticBaseSettingsSource):
    """Reads `<NAME>_FILE` for every secret setting, as systemd and Docker hand out credentials."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        path = os.environ.get(f"{field.validation_alias}_FILE", "")
        if field.annotation is not SecretStr or not path:
            return None, field_name, False
        try:
            return Path(path).read_text(encoding="utf-8").strip(), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{field.validation_alias}_FILE: {error}") from error

    def __call__(self) -> dict[str, Any]:
        values = {}
        for name, field in self.settings_cls.model_fields.items():
            value, _, _ = self.get_field_value(field, name)
            if value is not None:
                values[str(field.validation_alias)] = value
        return values


class KafkaSettings(BaseSettings):
    """How to reach Kafka, and what this relay is called."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    kafka_bootstrap_servers: Annotated[str, Field(validation_alias="KAFKA_BOOTSTRAP_SERVERS")]
    kafka_properties_file: Annotated[
        Path | None, Field(validation_alias="KAFKA_PROPERTIES_FILE")
    ] = None
    name: Annotated[
        str,
        Field(validation_alias="OUTBOX_RELAY_NAME", pattern=r"^[A-Za-z0-9._-]{1,100}$"),
    ] = "reservation-service"
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], Field(validation_alias="LOG_LEVEL")
    ] = "INFO"

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment first, then `<NAME>_FILE`."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, _SecretFiles(settings_cls)

    @property
    def cursor_topic(self) -> str:
        """The compacted topic that belongs to this relay alone."""
        return f"outbox-relay-cursor.{self.name}"

    def kafka_properties(self) -> dict[str, str]:
        """Return the user's librdkafka properties (TLS, SASL) with the bootstrap servers."""
        properties = {}
        if self.kafka_properties_file is not None:
            properties = _read_properties(self.kafka_properties_file)
        return {**properties, "bootstrap.servers": self.kafka_bootstrap_servers}


class Settings(KafkaSettings):
    """Everything `run`, `status` and `resume` need."""

    database_url: Annotated[SecretStr, Field(validation_alias="OUTBOX_RELAY_DATABASE_URL")]
    delivery: Annotated[
        Literal["at_least_once"], Field(validation_alias="OUTBOX_RELAY_DELIVERY")
    ] = "at_least_once"
    metrics_port: Annotated[int, Field(validation_alias="METRICS_PORT", ge=0, le=65535)] = 0
    chunk_max_rows: Annotated[
        int, Field(validation_alias="OUTBOX_RELAY_CHUNK_MAX_ROWS", ge=1, le=100_000)
    ] = 5_000
    chunk_max_bytes: Annotated[
        int, Field(validation_alias="OUTBOX_RELAY_CHUNK_MAX_BYTES", ge=1, le=64 * 2**20)
    ] = 8 * 2**20
    poll_interval_ms: Annotated[
        int, Field(validation_alias="OUTBOX_RELAY_POLL_INTERVAL_MS", ge=1, le=10_000)
    ] = 15

    @field_validator("delivery", mode="before")
    @classmethod
    def _not_yet(cls, value: object) -> object:
        if value == "exactly_once":
            raise ValueError("exactly_once is not available in this version; use at_least_once")
        return value


S = TypeVar("S", bound=KafkaSettings)


def load(settings_class: type[S]) -> S:
    """Read the environment.

    Raises:
        ConfigurationError: a variable is missing or wrong; the message names it.
    """
    try:
        return settings_class()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        variable = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(f"{variable}: {first['msg']}") from None


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
