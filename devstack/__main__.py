"""`python -m devstack`: the local stack for people. Exit codes as everywhere: 0, 1, 2."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from devstack.application import Application
from devstack.demo import demo
from devstack.processes import ConfigurationError, DevstackError
from devstack.stack import EnvironmentFile, Stack
from devstack.state import port_answers
from devstack.steps import Steps

PR_SET_PDEATHSIG = 1


@click.group()
def main() -> None:
    """Run the project's parts on this machine, without Docker."""


UP_PORT = 8000
CHECK_INTERVAL_S = 1
# As a shell counts a command that Ctrl-C ended: a demo that was cut off has shown nothing.
INTERRUPTED = 130


@main.command()
@click.option("--brokers", type=click.Choice(["1", "3"]), default="1", show_default=True)
def stack(brokers: str) -> None:
    """Databases, Kafka, migrations and topics, empty, until Ctrl-C or SIGTERM."""
    with (
        ending_well(),
        Steps() as steps,
        EnvironmentFile() as file,
        Stack(int(brokers), steps) as parts,
    ):
        parts.start()
        path = file.write(parts.environment)
        steps.console.print(f"  source {path} for every connection", highlight=False)
        say_ready(steps)
        while True:
            signal.pause()


@main.command("demo")
@click.option("--reservations", type=click.IntRange(100, 6_000), default=5_000, show_default=True)
def run_demo(reservations: int) -> None:
    """Book thousands of seats over HTTP and follow them into the analysts' tables."""
    with ending_well(INTERRUPTED), Steps() as steps:
        demo(steps, reservations)


@main.command()
@click.option("--port", type=click.IntRange(1, 65_535), default=UP_PORT, show_default=True)
def up(port: int) -> None:
    """The whole product with demo data and its booking page, until Ctrl-C or SIGTERM."""
    if port_answers(port):
        fail(f"port {port} on 127.0.0.1 is taken; end what listens there, or: make up PORT=N", 2)
    with (
        ending_well(),
        Steps() as steps,
        EnvironmentFile() as file,
        Stack(1, steps) as parts,
        Application(parts) as application,
    ):
        parts.start()
        with steps.step("service, relay and two workers"):
            application.seed()
            url = application.serve(port)
            application.run_pipeline()
        file.write(parts.environment)
        steps.console.print(f"  booking page at {url} (Ctrl-C stops everything)")
        say_ready(steps)
        while True:
            application.check_alive()
            signal.sigtimedwait([], CHECK_INTERVAL_S)


def say_ready(steps: Steps) -> None:
    """Print the line that others wait for, and nothing else in it."""
    steps.finish()
    click.echo("ready")
    sys.stdout.flush()


@contextmanager
def ending_well(interrupted_code: int = 0) -> Iterator[None]:
    """Turn signals into an orderly end with this code, expected failures into a line and a code."""
    interrupt_on_signals()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(interrupted_code)
    except ConfigurationError as error:
        fail(str(error), 2)
    except (DevstackError, TimeoutError) as error:
        fail(str(error), 1)


def interrupt_on_signals() -> None:
    """Let SIGTERM and a closed terminal end us as Ctrl-C does.

    Once: clearing up is left in peace (all that it waits for is bounded). Under make, which may
    be killed, its end is our order to stop as well.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.write(sys.stderr.fileno(), b"\n  stopping ...\n")
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    if "MAKELEVEL" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        # make may have ended while we were starting; nobody would tell us any more.
        if os.environ.get("DEVSTACK_PARENT", str(os.getppid())) != str(os.getppid()):
            sys.exit(INTERRUPTED)


def fail(message: str, code: int) -> None:
    """Say in one line what is wrong, and end with a code."""
    click.echo(f"devstack: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
