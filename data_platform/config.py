"""Settings of the data platform: the only place that reads the environment.

An empty variable is an unset one. Each secret may also be given as a file: `<NAME>_FILE`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

# What the guarantees rest on; a properties file may repeat these but not change them.
GUARANTEED_PROPERTIES: Mapping[str, str] = {
    # Kafka's committed offsets are a copy; Postgres' are the true ones.
    "enable.auto.commit": "false",
    # An offset that Kafka no longer has must never become another one by itself.
    "auto.offset.reset": "error",
    # The relay's open and aborted transactions are not events.
    "isolation.level": "read_committed",
    # Only the end of a partition tells how far transaction markers reach.
    "enable.partition.eof": "true",
}
# How to share the partitions: assigned one by one, each with the offset that Postgres has.
CLASSIC_GROUP: Mapping[str, str] = {
    "group.protocol": "classic",
    "partition.assignment.strategy": "cooperative-sticky",
}
# KIP-848: the broker assigns, and nobody waits for the slowest member. How soon it misses a killed
# worker is its own `group.consumer.session.timeout.ms`.
NEW_GROUP: Mapping[str, str] = {"group.protocol": "consumer"}
# Each topic by itself: a broker's own choice shares out both topics' partitions together, and with
# a worker for each of the events' partitions some would have none of them, others two.
NEW_GROUP_DEFAULTS: Mapping[str, str] = {"group.remote.assignor": "range"}
# Whoever sets one of these wants the classic protocol, which alone knows them.
CLASSIC_PROPERTIES: Mapping[str, str] = {
    # A killed worker's partitions move after this time.
    "session.timeout.ms": "10000",
    "heartbeat.interval.ms": "2000",
}
RESERVED_PROPERTIES: Mapping[str, str] = {
    "bootstrap.servers": "set KAFKA_BOOTSTRAP_SERVERS instead",
    "group.id": "set DATA_PLATFORM_GROUP instead",
    "group.instance.id": "two workers with one id would end each other",
}
# A properties file may change these.
CONSUMER_DEFAULTS: Mapping[str, str] = {
    # Bounds memory: what is fetched ahead of the batch in hand.
    "queued.max.messages.kbytes": "32768",
    "fetch.queue.backoff.ms": "50",
    "fetch.error.backoff.ms": "100",
    # A topic's new partitions, and a broker that is back, are seen soon.
    "topic.metadata.refresh.interval.ms": "10000",
    "reconnect.backoff.max.ms": "1000",
}


class ConfigurationError(Exception):
    """The configuration can't be used; the message is one line and names the variable."""


def _postgres_url(value: SecretStr) -> SecretStr:
    try:
        conninfo_to_dict(value.get_secret_value())
    except psycopg.ProgrammingError:  # its text would show the password
        raise ValueError("") from None
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


DatabaseUrl = Annotated[SecretStr, AfterValidator(_postgres_url)]
POSTGRES_URL = "a PostgreSQL connection URL like postgresql://user@host:5432/database"
PORT = "a port from 1 to 65535, or 0 for none"


class _Base(BaseSettings):
    """Each field's name is its variable in lower case, its description what is expected."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        BeforeValidator(_upper),
        Field(description="DEBUG, INFO, WARNING or ERROR"),
    ] = "INFO"


class OwnerSettings(_Base):
    """What `migrate` needs."""

    analytics_owner_database_url: Annotated[DatabaseUrl, Field(description=POSTGRES_URL)]


class AnalystSettings(_Base):
    """What `report` needs: it reads as analysts do."""

    analyst_database_url: Annotated[DatabaseUrl, Field(description=POSTGRES_URL)]


class DatabaseSettings(_Base):
    """What every command needs that reads the loader's tables."""

    analytics_database_url: Annotated[DatabaseUrl, Field(description=POSTGRES_URL)]


class TopicSettings(DatabaseSettings):
    """What a replay needs too: which topics are read."""

    data_platform_reservation_topic: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$", description="a topic's name")
    ] = "concert-reservation"
    data_platform_catalogue_topic: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$", description="a topic's name")
    ] = "concert-catalogue"


class Settings(TopicSettings):
    """What `run` and `status` need."""

    kafka_bootstrap_servers: Annotated[str, Field(description="brokers like host:9092,host:9092")]
    kafka_properties_file: Annotated[
        Path | None, Field(description="a file of librdkafka properties")
    ] = None
    metrics_port: Annotated[int, Field(ge=0, le=65535, description=PORT)] = 0
    metrics_host: Annotated[str, Field(description="an address of this machine")] = "127.0.0.1"
    data_platform_group: Annotated[str, Field(description="a consumer group's name")] = (
        "data-platform"
    )
    data_platform_batch_rows: Annotated[
        int, Field(ge=1, le=100_000, description="1 to 100000 records")
    ] = 20_000
    data_platform_batch_bytes: Annotated[
        int, Field(ge=1, le=2**28, description="1 to 268435456 bytes")
    ] = 2**24

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

    def consumer_properties(self) -> dict[str, str]:
        """Return librdkafka's properties for a consumer by the classic group protocol."""
        properties = self._reading_properties()
        properties.pop("group.remote.assignor", None)  # which it doesn't know
        return {**CLASSIC_PROPERTIES, **properties, **CLASSIC_GROUP}

    def new_group_properties(self) -> dict[str, str] | None:
        """Return those for KIP-848; None where the user's are for the classic protocol."""
        properties = self._reading_properties()
        if properties.get("group.protocol") == "classic" or CLASSIC_PROPERTIES.keys() & properties:
            return None
        properties.pop("partition.assignment.strategy", None)
        return {**NEW_GROUP_DEFAULTS, **properties, **NEW_GROUP}

    def _reading_properties(self) -> dict[str, str]:
        return {
            **CONSUMER_DEFAULTS,
            **self.client_properties(),
            **GUARANTEED_PROPERTIES,
            "group.id": self.data_platform_group,
        }

    def client_properties(self) -> dict[str, str]:
        """Return librdkafka's properties for any client: how to reach Kafka."""
        return {
            "client.id": "data-platform",
            **self._user_properties(),
            "bootstrap.servers": self.kafka_bootstrap_servers,
        }

    def _user_properties(self) -> dict[str, str]:
        if self.kafka_properties_file is None:
            return {}
        properties = _read_properties(self.kafka_properties_file)
        for name, value in properties.items():
            wanted = {**GUARANTEED_PROPERTIES, **CLASSIC_GROUP}.get(name)
            chosen = name == "group.protocol" and value == NEW_GROUP[name]
            if wanted is not None and value != wanted and not chosen:
                raise ConfigurationError(
                    f"KAFKA_PROPERTIES_FILE: {name}={value} is refused, events could be lost or "
                    f"doubled; expected {wanted}"
                )
            if name in RESERVED_PROPERTIES:
                raise ConfigurationError(
                    f"KAFKA_PROPERTIES_FILE: {name} is refused, {RESERVED_PROPERTIES[name]}"
                )
        return properties


class RebuildSettings(Settings, OwnerSettings):
    """What `rebuild` needs."""


class ReconcileSettings(Settings):
    """What `reconcile` needs."""

    reservation_database_url: Annotated[DatabaseUrl | None, Field(description=POSTGRES_URL)] = None
    outbox_relay_database_url: Annotated[DatabaseUrl | None, Field(description=POSTGRES_URL)] = None


S = TypeVar("S", bound=_Base)


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


def _secrets_from_files(settings_class: type[_Base]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in settings_class.model_fields.items():
        path = os.environ.get(f"{name.upper()}_FILE", "")
        if not path or not _is_secret(field.annotation):
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


def _is_secret(annotation: Any) -> bool:
    return annotation is SecretStr or any(map(_is_secret, get_args(annotation)))


def _read_properties(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"KAFKA_PROPERTIES_FILE: expected a readable text file: {error}"
        ) from None
    properties = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith(("#", "!")):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            raise ConfigurationError(f"KAFKA_PROPERTIES_FILE: line {number}: expected name=value")
        properties[name.strip()] = value.strip()
    return properties
