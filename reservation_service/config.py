"""What the environment says, read once and checked: the only reader of it in this package.

An empty variable is an unset one. A secret may also come from a file, named by `<NAME>_FILE`.
A wrong or missing value ends the command with one line that names the variable; the line never
holds a value, because the value may be a secret.
"""

import os
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import jwt
import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, HttpUrl, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

SECRETS = (
    "RESERVATION_OWNER_DATABASE_URL",
    "RESERVATION_DATABASE_URL",
    "RESERVATION_SECRET_KEY",
    "RESERVATION_SECRET_KEY_PREVIOUS",
    "RESERVATION_ADMIN_TOKEN",
)
SECRET_KEY_MIN_BYTES = 32
ADMIN_TOKEN_MIN_BYTES = 16
DISTINCT_CHARACTERS_MIN = 8
# By chance in one random secret of a million at most.
WORDS_OF_EXAMPLES = ("change", "default", "example", "insecure", "password", "secret", "123456")
SECRET_FILE_MAX_BYTES = 16_384


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that name or address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class ConfigurationError(Exception):
    """A variable is missing or wrong; the message names it and says what was expected."""


class Settings(BaseSettings):
    """The variables of the reservation service, checked."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", hide_input_in_errors=True, populate_by_name=True
    )

    owner_database_url: SecretStr | None = Field(None, alias="RESERVATION_OWNER_DATABASE_URL")
    database_url: SecretStr | None = Field(None, alias="RESERVATION_DATABASE_URL")
    secret_key: SecretStr | None = Field(None, alias="RESERVATION_SECRET_KEY")
    # Signs nothing any more: what it has signed is still believed, see docs/operations.md.
    previous_secret_key: SecretStr | None = Field(None, alias="RESERVATION_SECRET_KEY_PREVIOUS")
    admin_token: SecretStr | None = Field(None, alias="RESERVATION_ADMIN_TOKEN")
    jwks_url: HttpUrl | None = Field(None, alias="RESERVATION_JWKS_URL")
    jwks_file: Path | None = Field(None, alias="RESERVATION_JWKS_FILE")
    hold_seconds: int = Field(600, alias="RESERVATION_HOLD_SECONDS", ge=1, le=86_400)
    hold_max_seconds: int = Field(1800, alias="RESERVATION_HOLD_MAX_SECONDS", ge=1, le=86_400)
    # Bounded, because an event holds all seats of its reservation and must fit its topic.
    max_seats_per_request: int = Field(10, alias="RESERVATION_MAX_SEATS_PER_REQUEST", ge=1, le=500)
    max_seats_per_customer: int = Field(
        0, alias="RESERVATION_MAX_SEATS_PER_CUSTOMER", ge=0, le=1_000_000
    )
    writes_per_minute: int = Field(0, alias="RESERVATION_WRITES_PER_MINUTE", ge=0)
    # As OpenTelemetry hands a trace on to a program; an invalid one is not passed on.
    traceparent: str | None = Field(None, alias="TRACEPARENT")
    # OpenTelemetry reads these two and its others itself; traces are on when one of them is set.
    traces_endpoint: HttpUrl | None = Field(None, alias="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    otlp_endpoint: HttpUrl | None = Field(None, alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", alias="LOG_LEVEL")

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("secret_key", "previous_secret_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value and len(value.get_secret_value().encode()) < SECRET_KEY_MIN_BYTES:
            raise ValueError(f"expected at least {SECRET_KEY_MIN_BYTES} bytes")
        return value

    @field_validator("jwks_file")
    @classmethod
    def _a_key_set(cls, value: Path | None, others: ValidationInfo) -> Path | None:
        if value and others.data.get("jwks_url"):
            raise ValueError("expected this or RESERVATION_JWKS_URL, not both")
        if value:
            from reservation_service import jwks  # noqa: PLC0415 - few need the cryptography

            try:
                jwks.read(value)
            except (jwt.PyJWTError, OSError, ValueError):
                raise ValueError(
                    "expected a readable JSON Web Key Set of RSA or P-256 keys"
                ) from None
        return value

    @field_validator("owner_database_url", "database_url")
    @classmethod
    def _postgres_url(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            conninfo_to_dict(value.get_secret_value() if value else "")
        except psycopg.ProgrammingError:  # its text would show the password
            raise ValueError("expected a connection URL, postgresql://…") from None
        return value

    @property
    def traces_variable(self) -> str | None:
        """The variable that says where spans go; None when traces are off."""
        names = "traces_endpoint", "otlp_endpoint"
        set_one = next((name for name in names if getattr(self, name)), None)
        return set_one and type(self).model_fields[set_one].alias

    @property
    def previous_secret_keys(self) -> list[str]:
        """The keys of before, whose signatures still count: one or none."""
        return [key.get_secret_value() for key in [self.previous_secret_key] if key]

    def required(self, field: Literal["owner_database_url", "database_url", "secret_key"]) -> str:
        """Return a secret that the command can't do without.

        Raises:
            ConfigurationError: it is not set.
        """
        secret: SecretStr | None = getattr(self, field)
        if secret is None:
            name = type(self).model_fields[field].alias
            expected = {
                "owner_database_url": "the owner's connection URL, postgresql://…",
                "database_url": "the service's connection URL, postgresql://…",
                "secret_key": f"a random secret of at least {SECRET_KEY_MIN_BYTES} bytes",
            }[field]
            raise ConfigurationError(f"{name} is not set; expected {expected} (or {name}_FILE)")
        return secret.get_secret_value()

    def check_for_strangers(self) -> None:
        """Refuse secrets that others may know, before the service can be reached by others.

        Raises:
            ConfigurationError: a secret is too short, or is like those in examples.
        """
        for name, secret, least in (
            ("RESERVATION_SECRET_KEY", self.secret_key, SECRET_KEY_MIN_BYTES),
            ("RESERVATION_SECRET_KEY_PREVIOUS", self.previous_secret_key, SECRET_KEY_MIN_BYTES),
            ("RESERVATION_ADMIN_TOKEN", self.admin_token, ADMIN_TOKEN_MIN_BYTES),
        ):
            text = secret.get_secret_value() if secret else None
            if text is not None and (
                len(text.encode()) < least
                or len(set(text)) < DISTINCT_CHARACTERS_MIN
                or any(word in text.lower() for word in WORDS_OF_EXAMPLES)
            ):
                raise ConfigurationError(
                    f"{name}: expected at least {least} random bytes, not an example, to listen "
                    "on another than a loopback address (openssl rand -base64 32)"
                )


def load() -> Settings:
    """Read the environment.

    Raises:
        ConfigurationError: a variable holds something else than what was expected.
    """
    from_files: dict[str, Any] = {name: value for name in SECRETS if (value := _from_file(name))}
    try:
        return Settings(**from_files)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        # Pydantic names the variable where it read one, else the field.
        named = str(first["loc"][0])
        field = Settings.model_fields.get(named)
        raise ConfigurationError(f"{(field and field.alias) or named}: {message}") from None


def _from_file(name: str) -> str | None:
    path = os.environ.get(f"{name}_FILE")
    if not path:
        return None
    if os.environ.get(name):
        raise ConfigurationError(f"{name} and {name}_FILE are both set; expected one of them")
    try:
        with Path(path).open(encoding="utf-8") as file:
            content = file.read(SECRET_FILE_MAX_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{name}_FILE: expected a readable text file ({type(error).__name__})"
        ) from None
    if not content:
        raise ConfigurationError(f"{name}_FILE: expected the secret, but the file is empty")
    return content
