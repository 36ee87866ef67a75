"""The command `data-platform`. Exit codes: 0 fine, 1 the work failed, 2 wrong configuration."""

import os
import signal
import sys

# Before the other imports, which take a second: `run` may already be asked to end in there.
if sys.argv[1:2] == ["run"]:  # nothing is in hand yet; it sets a handler of its own later
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from logging import getLogger
from typing import Any

import click
import psycopg
from confluent_kafka import KafkaException
from psycopg.rows import dict_row

from data_platform import config, logs, sql
from data_platform.consumer import Source
from data_platform.events import decode_reservation_event
from data_platform.health import Health
from data_platform.loader import APPLICATION_NAME, CONNECT_TIMEOUT_S, Loader
from data_platform.status import Status, read_status
from data_platform.topics import Topics
from data_platform.worker import Worker


class CommandError(click.ClickException):
    """The work failed: exit code 1, one line."""

    def show(self, file: Any = None) -> None:
        """Say it without click's prefix, on one line."""
        click.echo(f"data-platform: {' '.join(self.message.split())}", err=True, file=file)


class WrongConfigurationError(CommandError):
    """Exit code 2."""

    exit_code = 2


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except config.ConfigurationError as error:
        raise WrongConfigurationError(str(error)) from error
    except psycopg.Error as error:
        raise CommandError(f"Postgres: {error}") from error
    except KafkaException as error:
        raise CommandError(f"Kafka: {error}") from error


@click.group()
@click.version_option(version("concert-reservation"), prog_name="data-platform")
def main() -> None:
    """Load reservation events from Kafka into the analysts' tables."""


@main.command()
def migrate() -> None:
    """Bring the analytics database's schema up to date (ANALYTICS_OWNER_DATABASE_URL)."""
    # Alembic and SQLAlchemy only here: the other commands start sooner without.
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    import migrations  # noqa: PLC0415

    with _clear_errors():
        settings = config.load(config.OwnerSettings)
        logs.set_up(settings.log_level)
        try:
            url = settings.analytics_owner_database_url.get_secret_value()
            migrations.upgrade("analytics", url)
        except SQLAlchemyError as error:
            raise CommandError(f"Postgres: {error}") from error


@main.command()
def run() -> None:
    """Load until SIGTERM. Any number of workers share the partitions."""
    with _clear_errors():
        settings = config.load(config.Settings)
        logs.set_up(settings.log_level)
        source = _source(settings)
        health = Health()
        if settings.metrics_port:
            _serve(health, settings)
    loader = Loader(settings.analytics_database_url.get_secret_value())
    decoders = {settings.data_platform_reservation_topic: decode_reservation_event}
    try:
        Worker(source, loader, decoders, health).run()
    except Exception:
        getLogger("data_platform").critical("ended by a fault of ours", exc_info=True)
        sys.exit(1)


def _source(settings: config.Settings) -> Source:
    logger = getLogger("librdkafka")
    try:
        return Source(
            {**settings.consumer_properties(), "logger": logger},
            Topics({**settings.client_properties(), "logger": logger}),
            [settings.data_platform_reservation_topic],
            batch_rows=settings.data_platform_batch_rows,
            batch_bytes=settings.data_platform_batch_bytes,
        )
    except (KafkaException, ValueError) as error:
        raise config.ConfigurationError(
            f"KAFKA_PROPERTIES_FILE or KAFKA_BOOTSTRAP_SERVERS: expected what librdkafka "
            f"takes: {error}"
        ) from error


def _serve(health: Health, settings: config.Settings) -> None:
    try:
        health.serve(settings.metrics_host, settings.metrics_port)
    except OSError as error:
        raise config.ConfigurationError(
            f"METRICS_PORT: expected a free port: {error.strerror}"
        ) from error


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
def status(*, as_json: bool) -> None:
    """Say how far the tables are behind Kafka; exit 1 when a partition can't go on."""
    with _clear_errors():
        settings = config.load(config.Settings)
        logs.set_up(settings.log_level)
        logger = getLogger("librdkafka")
        found = read_status(
            settings.analytics_database_url.get_secret_value(),
            Topics({**settings.client_properties(), "logger": logger}),
            {**settings.consumer_properties(), "logger": logger},
            [settings.data_platform_reservation_topic],
        )
    click.echo(json.dumps(found.as_json()) if as_json else _in_words(found))
    sys.exit(1 if found.problems else 0)


def _in_words(found: Status) -> str:
    lines = [f"{'topic':<24} {'partition':>9} {'next':>12} {'end':>12} {'lag':>10}"]
    lines += [
        f"{p.topic:<24} {p.partition:>9} {p.next_offset:>12} {p.end_offset:>12} {p.lag_rows:>10}"
        for p in found.partitions
    ]
    lines.append(
        f"lag: {found.lag_rows} rows, {found.lag_seconds:g} s; dead letters: {found.dead_letters}"
    )
    return "\n".join([*lines, *(f"problem: {problem}" for problem in found.problems)])


@main.group("dead-letters")
def dead_letters() -> None:
    """Look at records that could not be loaded because of what they contain."""


@dead_letters.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
def list_dead_letters(limit: int) -> None:
    """Print the newest dead letters as JSON lines, without their contents."""
    for row in _rows(sql.LIST_DEAD_LETTERS, {"limit": limit}):
        click.echo(json.dumps(row, default=_as_text))


@dead_letters.command("show")
@click.argument("topic")
@click.argument("partition", type=int)
@click.argument("offset", type=int)
def show_dead_letter(topic: str, partition: int, offset: int) -> None:
    """Print one dead letter as JSON; raw_key and raw_value in base64."""
    place = {"topic": topic, "kafka_partition": partition, "kafka_offset": offset}
    rows = _rows(sql.SHOW_DEAD_LETTER, place)
    if not rows:
        raise CommandError(f"no dead letter at {topic} {partition} {offset}")
    click.echo(json.dumps(rows[0], default=_as_text, indent=2))


def _rows(statement: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    with _clear_errors():
        settings = config.load(config.DatabaseSettings)
        with psycopg.connect(
            settings.analytics_database_url.get_secret_value(),
            application_name=f"{APPLICATION_NAME} dead-letters",
            connect_timeout=CONNECT_TIMEOUT_S,
            row_factory=dict_row,
        ) as connection:
            connection.execute(sql.STATUS_SESSION)
            return connection.execute(statement, parameters).fetchall()


def _as_text(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    main()
