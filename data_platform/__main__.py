"""The command `data-platform`. Exit codes: 0 fine, 1 the work failed, 2 wrong configuration."""

import os
import signal
import sys

# Before the other imports, which take a second: `run` may already be asked to end in there.
if sys.argv[1:2] == ["run"]:  # nothing is in hand yet; it sets a handler of its own later
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC
from functools import partial
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import click
import psycopg
import structlog
from confluent_kafka import KafkaException

from data_platform import config, logs, reconcile_loop
from data_platform import dead_letters as letters
from data_platform.consumer import Source
from data_platform.errors import KafkaTroubleError, RivalError, told
from data_platform.events import Decoder, decode_concert_event, decode_reservation_event
from data_platform.freshness import Watermarks
from data_platform.health import Health
from data_platform.loader import Loader
from data_platform.notify import Notifier
from data_platform.rebuild import RebuildRefusedError, Rebuilt
from data_platform.rebuild import rebuild as make_again
from data_platform.reconcile import Sources
from data_platform.reconcile import reconcile as run_reconcile
from data_platform.status import Status, read_status
from data_platform.topics import Topics
from data_platform.worker import Worker

if TYPE_CHECKING:
    from data_platform.tracing import Traces

SHOWN_DIFFERENCES = 100


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
        raise CommandError(f"Postgres: {told(error)}") from error
    except (KafkaException, KafkaTroubleError) as error:
        raise CommandError(f"Kafka: {error}") from error


class _Commands(click.Group):
    """Tells wrong usage in one line: not how to use the command, but what is wrong."""

    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        with _without_usage():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: click.Context) -> Any:
        with _without_usage():
            return super().invoke(ctx)


@contextmanager
def _without_usage() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        error.ctx = None
        raise


@click.group(cls=_Commands)
@click.version_option(version("concert-reservation"), prog_name="data-platform")
def main() -> None:
    """Load reservation events from Kafka into the analysts' tables."""


@main.command()
def migrate() -> None:
    """Bring the analytics schema up to date. As ANALYTICS_OWNER_DATABASE_URL."""
    # Alembic and SQLAlchemy only here: the other commands start sooner without.
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError  # noqa: PLC0415

    import migrations  # noqa: PLC0415

    with _clear_errors():
        settings = config.load(config.OwnerSettings)
        logs.set_up(settings.log_level)
        try:
            url = settings.analytics_owner_database_url.get_secret_value()
            migrations.upgrade("analytics", url)
        except SQLAlchemyError as error:
            cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
            to_do = ""
            if isinstance(cause, psycopg.errors.LockNotAvailable):
                to_do = "; somebody's query holds a table. Nothing has changed: run it again"
            raise CommandError(f"Postgres: {told(cause)}{to_do}") from error


@main.command()
def run() -> None:
    """Load until SIGTERM. Any number of workers share the partitions."""
    with _clear_errors():
        settings = config.load(config.Settings)
        logs.set_up(settings.log_level)
        source = _source(settings)
        traces = _traces(settings)
        health = Health(
            Notifier(settings.notify_socket, settings.watchdog_usec, settings.watchdog_pid)
        )
        if settings.metrics_port:
            _serve(health, settings)
    loader = Loader(settings.analytics_database_url.get_secret_value())
    _begin_telling_freshness(settings, health)
    try:
        Worker(source, loader, _decoders(settings), health, traces=traces).run()
        if traces is not None:
            traces.close()
    except Exception as error:  # noqa: BLE001 - told, and the end of the process
        # Where, and what kind; a traceback's last line may quote the record.
        where = [f"{frame.filename}:{frame.lineno}" for frame in extract_tb(error.__traceback__)]
        fault = structlog.get_logger("data_platform")
        fault.critical("ended by a fault of ours", cause=told(error), where=where)
        sys.exit(1)


def _traces(settings: config.Settings) -> "Traces | None":
    """Return where spans go; None when traces are off, which nothing is imported for."""
    if settings.traces_variable is None:
        return None
    try:
        from data_platform.tracing import Traces  # noqa: PLC0415

        return Traces(settings.data_platform_group)
    except ImportError as error:
        raise config.ConfigurationError(
            f"{settings.traces_variable} is set, but OpenTelemetry is not installed: expected "
            "what requirements/tracing.txt pins, the extra concert-reservation[tracing]"
        ) from error
    except ValueError as error:
        raise config.ConfigurationError(f"an OTEL_ variable has a wrong value: {error}") from error


def _begin_telling_freshness(settings: config.Settings, health: Health) -> None:
    watermarks = Watermarks(
        settings.analytics_database_url.get_secret_value(),
        Topics({**settings.client_properties(), "logger": getLogger("librdkafka")}),
        list(_decoders(settings)),
        health,
    )
    # It ends with the process: it holds nothing that could be lost.
    never = threading.Event()
    threading.Thread(target=watermarks.run, args=(never,), name="freshness", daemon=True).start()


def _decoders(settings: config.TopicSettings) -> dict[str, Decoder]:
    return {
        settings.data_platform_reservation_topic: decode_reservation_event,
        settings.data_platform_catalogue_topic: decode_concert_event,
    }


def _source(settings: config.Settings) -> Source:
    logger = getLogger("librdkafka")
    new_group = settings.new_group_properties()
    try:
        return Source(
            {**settings.consumer_properties(), "logger": logger},
            Topics({**settings.client_properties(), "logger": logger}),
            list(_decoders(settings)),
            batch_rows=settings.data_platform_batch_rows,
            batch_bytes=settings.data_platform_batch_bytes,
            new_group=new_group and {**new_group, "logger": logger},
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
    """Say how far the tables are behind Kafka. Exit 1 when a partition can't go on."""
    with _clear_errors():
        settings = config.load(config.Settings)
        logs.set_up(settings.log_level)
        logger = getLogger("librdkafka")
        found = read_status(
            settings.analytics_database_url.get_secret_value(),
            Topics({**settings.client_properties(), "logger": logger}),
            {**settings.consumer_properties(), "logger": logger},
            list(_decoders(settings)),
        )
    click.echo(json.dumps(asdict(found)) if as_json else _in_words(found))
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


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="The file to write; standard output without.",
)
def report(*, output: Path | None) -> None:
    """Write a page about the bookings. One HTML file with charts, read as ANALYST_DATABASE_URL."""
    from data_platform import report as pages  # noqa: PLC0415 - the others start sooner without

    with _clear_errors():
        settings = config.load(config.AnalystSettings)
        text = pages.page(pages.read(settings.analyst_database_url.get_secret_value()))
    if output is None:
        click.echo(text, nl=False)
        return
    unfinished = output.parent / f".{output.name}.unfinished"
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(output)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise WrongConfigurationError(
            f"--output: expected a file that can be written: {error.strerror}"
        ) from error


@main.command()
def doctor() -> None:
    """Examine what the workers stand on. Say what is wrong and what to do about it."""
    from data_platform import doctor as examiner  # noqa: PLC0415 - Alembic comes along

    with _clear_errors():
        findings = examiner.examine_all(config.load(config.Settings))
    click.echo(examiner.render(findings))
    sys.exit(1 if examiner.failed(findings) else 0)


@main.group("dead-letters")
def dead_letters() -> None:
    """Look at records that could not be loaded. Only for what they contain is one put aside."""


@dead_letters.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.option("--topic", help="Only of this topic.")
@click.option("--reason", help="Only with this reason.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line, for programs.")
def list_dead_letters(limit: int, topic: str | None, reason: str | None, *, as_json: bool) -> None:
    """Print the newest dead letters, a line each. `show` tells what one contains."""
    with _clear_errors():
        url = config.load(config.DatabaseSettings).analytics_database_url.get_secret_value()
        rows = letters.read_list(url, letters.Scope(topic, reason=reason), limit)
    for row in rows:
        line = json.dumps(row, default=_as_text) if as_json else _one_line(row)
        click.echo(line)


@dead_letters.command("show")
@click.argument("topic")
@click.argument("partition", type=int)
@click.argument("offset", type=int)
def show_dead_letter(topic: str, partition: int, offset: int) -> None:
    """Print one dead letter as JSON; raw_key and raw_value in base64."""
    with _clear_errors():
        url = config.load(config.DatabaseSettings).analytics_database_url.get_secret_value()
        row = letters.read_one(url, letters.Place(topic, partition, offset))
    if row is None:
        raise CommandError(f"no dead letter at {topic} {partition} {offset}")
    click.echo(json.dumps(row, default=_as_text, indent=2))


@dead_letters.command("replay")
@click.argument("topic", required=False)
@click.argument("partition", type=int, required=False)
@click.argument("offset", type=int, required=False)
@click.option("--all", "every", is_flag=True, help="All there are, which is also the default.")
@click.option("--reason", help="Only those with this reason.")
@click.option("--dry-run", is_flag=True, help="Only say what would become of them.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
def replay_dead_letters(
    topic: str | None,
    partition: int | None,
    offset: int | None,
    reason: str | None,
    *,
    every: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Load dead letters again. All, those with a REASON, of a TOPIC or PARTITION, or one.

    Those still bad stay. May be repeated at any time, beside workers and other replays.
    """
    scope = letters.Scope(topic, partition, offset, reason)
    if every and scope != letters.Scope():
        raise WrongConfigurationError("--all: expected no other choice beside it")
    with _clear_errors():
        settings = config.load(config.TopicSettings)
        logs.set_up(settings.log_level)
        url = settings.analytics_database_url.get_secret_value()
        try:
            done = letters.replay(url, scope, _decoders(settings), dry_run=dry_run)
        except RivalError as error:
            raise CommandError(f"{error}; run it again") from error
    click.echo(json.dumps(asdict(done)) if as_json else done.in_words(dry_run=dry_run))
    if offset is not None and not done.loaded:
        raise CommandError(f"{topic} {partition} {offset} is not loaded")


@main.command()
@click.option("--dry-run", is_flag=True, help="Only compare; exit 1 where something differs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
def rebuild(*, dry_run: bool, as_json: bool) -> None:
    """Make all tables again from Kafka. Workers go on; as ANALYTICS_OWNER_DATABASE_URL.

    What comes out different is put into the old tables' place, in one short transaction.
    """
    with _clear_errors():
        settings = config.load(config.RebuildSettings)
        logs.set_up(settings.log_level)
        logger = getLogger("librdkafka")
        try:
            done = make_again(
                settings.analytics_owner_database_url.get_secret_value(),
                Topics({**settings.client_properties(), "logger": logger}),
                {**settings.consumer_properties(), "logger": logger},
                _decoders(settings),
                dry_run=dry_run,
            )
        except RebuildRefusedError as error:
            raise CommandError(f"nothing has changed: {error}") from error
    click.echo(json.dumps(asdict(done)) if as_json else _rebuilt_in_words(done, dry_run=dry_run))
    sys.exit(1 if dry_run and done.differences else 0)


def _rebuilt_in_words(done: Rebuilt, *, dry_run: bool) -> str:
    lines = [found.in_words() for found in done.differences[:SHOWN_DIFFERENCES]]
    if len(done.differences) > SHOWN_DIFFERENCES:
        lines.append(f"and {len(done.differences) - SHOWN_DIFFERENCES} more (--json)")
    changed = ", ".join(done.changed) or "nothing"
    lines.append(
        f"{done.events} events and {done.dead_letters} dead letters in {done.seconds:g} s; "
        f"{'would change' if dry_run else 'changed'}: {changed}; "
        f"workers waited {done.locked_s:g} s"
    )
    return "\n".join(lines)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object for programs.")
@click.option("--without-service", is_flag=True, help="Compare only topic and tables.")
@click.option(
    "--every",
    "interval_s",
    type=click.FloatRange(min=1),
    help="Again and again, every so many seconds.",
)
def reconcile(*, as_json: bool, without_service: bool, interval_s: float | None) -> None:
    """Compare service, outbox, topic and tables. Name each difference, exit 1 on any.

    Changes nothing. With --every it goes on until SIGTERM, and METRICS_PORT tells the outcome.
    """
    with _clear_errors():
        settings = config.load(config.ReconcileSettings)
        logs.set_up(settings.log_level)
        sources = _sources(settings, without_service=without_service)
        logger = getLogger("librdkafka")
        compare = partial(
            run_reconcile,
            sources,
            Topics({**settings.client_properties(), "logger": logger}),
            {**settings.consumer_properties(), "logger": logger},
            _decoders(settings),
        )
        if interval_s is not None:
            reconcile_loop.run(compare, interval_s, settings.metrics_host, settings.metrics_port)
            return
        report = compare()
    click.echo(json.dumps(asdict(report)) if as_json else report.in_words(SHOWN_DIFFERENCES))
    sys.exit(0 if report.good else 1)


def _sources(settings: config.ReconcileSettings, *, without_service: bool) -> Sources:
    service, outbox = settings.reservation_database_url, settings.outbox_relay_database_url
    if service is None and not without_service:
        raise config.ConfigurationError(
            f"RESERVATION_DATABASE_URL is not set: expected {config.POSTGRES_URL}, "
            "or --without-service"
        )
    return Sources(
        settings.analytics_database_url.get_secret_value(),
        service.get_secret_value() if service and not without_service else None,
        outbox.get_secret_value() if outbox and not without_service else None,
        settings.data_platform_reservation_topic,
        settings.data_platform_catalogue_topic,
    )


def _one_line(row: dict[str, Any]) -> str:
    place = f"{row['topic']} {row['kafka_partition']} {row['kafka_offset']}"
    seen = row["first_seen_at"].astimezone(UTC)
    line = f"{place}  {seen:%Y-%m-%dT%H:%M:%SZ}  {row['reason']}: {row['error']}"
    # What the record's writer put into it must not steer the reader's terminal.
    return "".join(char if char.isprintable() else "?" for char in line)


def _as_text(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    main()
