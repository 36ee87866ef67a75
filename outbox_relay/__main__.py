"""The command `outbox-relay`."""

import os
import signal
import sys

# Before the other imports, which take a second: `run` may already be asked to end in there.
if sys.argv[1:2] == ["run"]:  # nothing is in hand yet; it sets a handler of its own later
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import click
import psycopg
import structlog
from confluent_kafka import KafkaException

from outbox_relay import (
    __version__,
    doctor,
    exactly_once,
    leadership,
    logs,
    metrics,
    producer,
    quarantine,
    status,
    topics,
)
from outbox_relay.config import ConfigurationError, KafkaSettings, Settings, load
from outbox_relay.leadership import RefusedError
from outbox_relay.notify import Notifier
from outbox_relay.relay import Relay, StuckError
from outbox_relay.retention import Retention
from outbox_relay.stopping import Stop, StopOverdueError

if TYPE_CHECKING:
    from outbox_relay.tracing import Traces

# What isn't our fault: a line tells it, no traceback.
FAILURES = (RefusedError, psycopg.Error, KafkaException, producer.PublishError, TimeoutError)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="outbox-relay")
def cli() -> None:
    """Publish the reservation database's outbox to Kafka."""


@cli.command()
def run() -> None:
    """Publish until stopped; one relay of a name leads, others stand by."""
    settings = load(Settings)
    try:  # a relay that stands by must not find out when it takes over
        producer.check(settings.kafka_properties())
    except KafkaException as error:
        raise ConfigurationError(f"KAFKA_PROPERTIES_FILE: {error.args[0].str()}") from error
    logs.configure(settings.log_level)
    structlog.contextvars.bind_contextvars(relay=settings.outbox_relay_name)
    notifier = Notifier(settings.notify_socket, settings.watchdog_usec, settings.watchdog_pid)
    traces = _traces(settings)
    relay = Relay(settings, Stop(), metrics.Metrics(), notifier, traces)
    if settings.metrics_port:
        try:
            metrics.serve(relay.metrics, settings.metrics_host, settings.metrics_port)
        except OSError as error:
            where = f"{settings.metrics_host}:{settings.metrics_port}"
            raise ConfigurationError(
                f"METRICS_PORT: cannot listen on {where} ({error.strerror}); expected a free port"
            ) from error
    try:
        relay.run()
        if traces is not None:
            traces.close()
    except StopOverdueError:
        structlog.get_logger().warning("stopped with work in flight; it will be read again")
        notifier.stopping()
        # A lane that hangs must not be in the way of the interpreter's own end.
        os._exit(0)
    except StuckError as error:
        structlog.get_logger().error("ends because it hangs", error=str(error))
        notifier.stopping()
        os._exit(1)
    notifier.stopping()


def _traces(settings: Settings) -> "Traces | None":
    """Return where spans go; None when traces are off, which nothing is imported for."""
    if settings.traces_variable is None:
        return None
    try:
        from outbox_relay.tracing import Traces  # noqa: PLC0415

        return Traces()
    except ImportError as error:
        raise ConfigurationError(
            f"{settings.traces_variable} is set, but OpenTelemetry is not installed: expected"
            " what requirements/tracing.txt pins, the extra concert-reservation[tracing]"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"an OTEL_ variable has a wrong value: {error}") from error


@cli.command("topics")
@click.option("--replication-factor", type=click.IntRange(min=1), help="default: 3, or all brokers")
def make_topics(replication_factor: int | None) -> None:
    """Make all topics, or check those that exist."""
    settings = load(KafkaSettings)
    outcomes = topics.make_or_check(
        settings.kafka_properties(), settings.cursor_topic, replication_factor
    )
    for outcome in outcomes:
        click.echo(f"{outcome.topic}: {outcome.state} {'; '.join(outcome.differences)}".rstrip())
    if any(outcome.state == "differs" for outcome in outcomes):
        sys.exit(1)


@cli.command("status")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def show_status(*, as_json: bool) -> None:
    """Show the leader, the lag and the cursor."""
    settings = load(Settings)
    with leadership.connect(settings.database_url, "status") as connection:
        found = status.status(connection, settings)
    _show(found, as_json=as_json)


@cli.command()
@click.option("--from-id", type=click.IntRange(min=1), required=True, help="first row to publish")
@click.option("--apply", is_flag=True, help="do it; else only show what would be done")
@click.option("--topic", help="only this topic; else all of them")
def resume(from_id: int, topic: str | None, *, apply: bool) -> None:
    """Accept this database's history after a restore or promotion and go on from a row."""
    settings = load(Settings)
    with leadership.connect(settings.database_url, "resume") as connection:
        status.refuse_while_running(connection, settings.outbox_relay_name)
        generation = exactly_once.newest_generation(settings, connection)
        done = status.resume(connection, settings, generation, from_id, topic, apply=apply)
    click.echo(
        f"{'done' if apply else 'would be done (nothing changed; --apply does it)'}:"
        f" publish {done['publishes_rows']} committed rows from id {from_id} on"
        f" ({done['repeats_rows']} of them again, as far as the cursor knows),"
        f" skip {done['skips_rows']} before it"
    )
    if from_id > (done["newest_id"] or 0):
        click.echo(
            f"warning: the newest row is {done['newest_id'] or 'none'}, so this skips all there is",
            err=True,
        )


@cli.command("doctor")
def examine() -> None:
    """Examine what the relay stands on; say what is wrong and what to do about it."""
    findings = doctor.examine_all(load(Settings))
    click.echo(doctor.render(findings))
    if doctor.failed(findings):
        sys.exit(1)


@cli.command()
def prune() -> None:
    """Let go of every partition of the outbox that is published and old enough."""
    settings = load(Settings)
    with leadership.connect(settings.database_url, "prune") as connection:
        leadership.examine(connection)
        pruned = Retention(settings.outbox_relay_retention_hours).prune(connection)
        for partition in pruned:
            became = f"kept: {partition.kept}" if partition.kept else "dropped"
            click.echo(
                f"{partition.name}: about {partition.ids} rows,"
                f" {partition.size_bytes / 2**20:.1f} MiB, {became}"
            )
    if not pruned:
        click.echo("the outbox is empty: there is nothing to let go of")


@cli.group("quarantine")
def quarantine_commands() -> None:
    """Show and release events that Kafka has refused."""


@quarantine_commands.command("list")
def list_quarantined() -> None:
    """Show what waits, the oldest first; of each key only the first can be released."""
    settings = load(Settings)
    with leadership.connect(settings.database_url, "quarantine list") as connection:
        rows = quarantine.listed(connection, settings.outbox_relay_name)
        for row in rows:
            why = row["error"] or "waits behind an earlier event of its key"
            released = " (released)" if row["released_at"] else ""
            click.echo(
                f"{row['id']} {row['topic']} key {row['key']} {row['bytes']} bytes"
                f" since {row['quarantined_at']:%Y-%m-%dT%H:%M:%SZ}{released}: {why}"
            )
    if not rows:
        click.echo(f"no event of the relay {settings.outbox_relay_name} is in quarantine")


@quarantine_commands.command("release")
@click.argument("event_id", type=click.IntRange(min=1), metavar="ID")
def release_quarantined(event_id: int) -> None:
    """Let the leader try event ID again, and then those that wait behind it."""
    settings = load(Settings)
    with leadership.connect(settings.database_url, "quarantine release") as connection:
        quarantine.release(connection, settings.outbox_relay_name, event_id)
    click.echo(f"{event_id}: released; the leading relay tries it within about a second")


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            for topic, told in value.items():
                words = ", ".join(f"{what} {_or_dash(found)}" for what, found in told.items())
                click.echo(f"{name:14} {topic}: {words}")
        else:
            click.echo(f"{name:14} {_or_dash(value)}")


def _or_dash(value: object) -> object:
    return "-" if value is None else value


def main() -> NoReturn:
    """Run the command; expected failures become one line and an exit code (1 failed, 2 usage)."""
    sys.exit(_exit_code(cli))


def _exit_code(command: Callable[..., Any]) -> int:
    try:
        command(prog_name="outbox-relay", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        helps = isinstance(error, click.exceptions.NoArgsIsHelpError)
        if isinstance(error, click.UsageError) and not helps:
            error.ctx = None  # with it, two lines about the command stand before what is wrong
        error.show()
        return error.exit_code
    except click.Abort:
        return 1
    except ConfigurationError as error:
        click.echo(f"outbox-relay: {error}", err=True)
        return 2
    except FAILURES as error:
        click.echo(f"outbox-relay: {_told(error)}", err=True)
        return 1
    return 0


def _told(error: Exception) -> str:
    if isinstance(error, TimeoutError):  # of a client's future, which has no words of its own
        return "Kafka did not answer in time"
    text = error.args[0].str() if isinstance(error, KafkaException) else str(error)
    return " ".join(text.split())


if __name__ == "__main__":
    main()
