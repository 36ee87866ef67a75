"""The command line of the reservation service.

Exit codes: 0 fine, 1 the work failed, 2 wrong usage or configuration.
"""

import os
import signal
import sys

# Before the other imports, which take a second: these may already be asked to end in there.
if sys.argv[1:2] in (["serve"], ["expire-holds"]):  # nothing is in hand yet; later they set theirs
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psycopg
import structlog

from reservation_service import config, logs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reservation_service.database import Connection

log = structlog.get_logger(__name__)

DAY_S = 86_400


class WrongFile(click.ClickException):
    """What was given can't be used: exit code 2."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="concert-reservation", prog_name="reservation-service")
@click.pass_context
def commands(context: click.Context) -> None:
    """Sell seats; every change is an event in the outbox of the same transaction."""
    if {"--help", "-h"}.isdisjoint(sys.argv):
        settings = config.load()
        logs.configure(settings.log_level)
        context.obj = settings


@commands.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65_535))
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 256))
@click.pass_obj
def serve(settings: config.Settings, host: str, port: int, workers: int) -> None:
    """Serve the API and the booking page until SIGTERM."""
    from reservation_service import serve as server  # noqa: PLC0415 - only this command needs it

    server.serve(settings, host, port, workers)


@commands.command()
@click.pass_obj
def migrate(settings: config.Settings) -> None:
    """Bring the reservation database up to the newest revision."""
    import sqlalchemy  # noqa: PLC0415 - only this command needs Alembic

    import migrations  # noqa: PLC0415

    try:
        migrations.upgrade("reservations", settings.required("owner_database_url"))
    except sqlalchemy.exc.DBAPIError as error:
        raise click.ClickException(" ".join(f"migrate: {error.orig}".split())) from None


@commands.command("seed-demo")
@click.pass_obj
def seed_demo(settings: config.Settings) -> None:
    """Publish demo concerts, unless one with enough free seats is on sale."""
    from reservation_service import demo  # noqa: PLC0415
    from reservation_service.database import connect  # noqa: PLC0415

    url = settings.required("database_url")
    with connect(url, "reservation-service seed-demo") as connection:
        made = demo.seed(connection)
    log.info("seeded", concerts=made)


@commands.command()
@click.argument("customer_id")
@click.option("--ttl-hours", default=24, show_default=True, type=click.IntRange(1, 24 * 366))
@click.pass_obj
def token(settings: config.Settings, customer_id: str, ttl_hours: int) -> None:
    """Print a token that acts as CUSTOMER_ID."""
    from reservation_service.callers import make_token  # noqa: PLC0415

    secret = settings.required("secret_key")
    try:
        click.echo(make_token(customer_id, secret, ttl_hours * 3_600))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="CUSTOMER_ID") from None


@commands.command("import-concert")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Only say what is wrong with the file.")
@click.pass_obj
def import_concert(settings: config.Settings, file: Path, *, check: bool) -> None:
    """Publish the concert in FILE (JSON or CSV), unless it is published already."""
    from reservation_service import concert_import  # noqa: PLC0415

    try:
        concert = concert_import.read(file)
    except concert_import.FileError as error:
        raise WrongFile(str(error)) from None
    if check:
        click.echo(concert_import.summary(concert))
        return
    with _admin_of(settings, "import-concert") as connection:
        try:
            done = concert_import.publish_once(connection, concert, settings.traceparent)
        except concert_import.AlreadyThereError as error:
            raise click.ClickException(f"{file.name}: {error}; nothing was changed") from None
    said = "is there already; nothing was changed" if done.known else "published"
    click.echo(f"concert {done.concert_id} {said}: {concert_import.summary(concert)}")


@commands.command("block-seats")
@click.argument("performance_id", type=click.IntRange(min=1))
@click.argument("seat_ids", type=click.IntRange(min=1), nargs=-1, required=True)
@click.option("--release", is_flag=True, help="Give them back to the sale instead.")
@click.pass_obj
def block_seats(
    settings: config.Settings, performance_id: int, seat_ids: tuple[int, ...], *, release: bool
) -> None:
    """Take seats from the sale, all or none."""
    from reservation_service import catalogue_changes  # noqa: PLC0415

    change = catalogue_changes.release if release else catalogue_changes.block
    with _admin_of(settings, "block-seats") as connection:
        done = change(connection, performance_id, seat_ids, settings.traceparent)
    click.echo(f"{len(done.changed_seats)} seats {'released' if release else 'blocked'}")


@commands.command("cancel-performance")
@click.argument("performance_id", type=click.IntRange(min=1))
@click.pass_obj
def cancel_performance(settings: config.Settings, performance_id: int) -> None:
    """Cancel a performance with all its reservations; run it again if it was interrupted."""
    from reservation_service import cancellation  # noqa: PLC0415

    with _admin_of(settings, "cancel-performance") as connection:
        done = cancellation.cancel(connection, performance_id, settings.traceparent)
    click.echo(f"performance {performance_id} is cancelled; {done.cancelled} reservations with it")


@contextmanager
def _admin_of(settings: config.Settings, command: str) -> "Iterator[Connection]":
    """Connect, and tell a refusal in one line."""
    from reservation_service.database import connect  # noqa: PLC0415
    from reservation_service.problems import Problem  # noqa: PLC0415

    url = settings.required("database_url")
    try:
        with connect(url, f"reservation-service {command}") as connection:
            yield connection
    except Problem as problem:
        seats = ", ".join(map(str, problem.members.get("unavailable_seats", ())))
        raise click.ClickException(f"{problem}{f' Seats: {seats}' if seats else ''}") from None


@commands.command("expire-holds")
@click.option(
    "--every", type=click.FloatRange(0.01, DAY_S), metavar="SECONDS", help="Go on until SIGTERM."
)
@click.pass_obj
def expire_holds(settings: config.Settings, every: float | None) -> None:
    """Write down what ran out, finish cancellations, forget old idempotency keys."""
    from reservation_service import expiry  # noqa: PLC0415
    from reservation_service.database import connect  # noqa: PLC0415

    url = settings.required("database_url")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if every is not None:
        expiry.run(url, every, stop)
        return
    with connect(url, "reservation-service expire-holds") as connection:
        expiry.sweep(connection, stop)


def main() -> None:
    """Run a command, telling errors in one line on stderr."""
    try:
        sys.exit(commands(prog_name="reservation-service", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        if isinstance(error, click.UsageError):
            error.ctx = None  # with it, two lines about the command stand before what is wrong
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(1)
    except config.ConfigurationError as error:
        click.echo(f"reservation-service: {error}", err=True)
        sys.exit(2)
    except psycopg.Error as error:
        # libpq's messages name host and port, never the password.
        message = " ".join(str(error).split())
        click.echo(f"reservation-service: database: {message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
