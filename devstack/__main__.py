"""`python -m devstack`: the local stack for people. Exit codes as everywhere: 0, 1, 2."""

import ctypes
import os
import signal
import sys
from types import FrameType

import click

from devstack.processes import ConfigurationError, DevstackError
from devstack.stack import EnvironmentFile, Stack
from devstack.steps import Steps

PR_SET_PDEATHSIG = 1


@click.group()
def main() -> None:
    """Run the project's parts on this machine, without Docker."""


@main.command()
@click.option("--brokers", type=click.Choice(["1", "3"]), default="1", show_default=True)
def stack(brokers: str) -> None:
    """Databases, Kafka, migrations and topics, empty, until Ctrl-C or SIGTERM."""
    interrupt_on_signals()
    try:
        with Steps() as steps, EnvironmentFile() as file, Stack(int(brokers), steps) as parts:
            parts.start()
            path = file.write(parts.environment)
            steps.console.print(f"  source {path} for every connection", highlight=False)
            click.echo("ready")
            sys.stdout.flush()
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return
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
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    if "MAKELEVEL" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def fail(message: str, code: int) -> None:
    """Say in one line what is wrong, and end with a code."""
    click.echo(f"devstack: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
