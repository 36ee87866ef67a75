"""The product's own processes on a started stack: service, sweeper, relay and workers."""

import json
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Self

from devstack.processes import DevstackError, Process, succeed, wait_until
from devstack.stack import COMMAND_TIMEOUT_S, Stack
from devstack.state import free_port

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 12.0


class Application:
    """Starts the parts on a stack and ends them all with the `with` block."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._cleanup = ExitStack()
        self.processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def seed(self) -> None:
        """Publish the demo's concerts."""
        succeed(self._stack.program("reservation_service", "seed-demo"), COMMAND_TIMEOUT_S)

    def serve(self, port: int = 0, *, workers: int = 2, hold_s: int = 600) -> str:
        """Start a service whose holds last `hold_s` seconds; return its base URL when ready."""
        port = port or free_port()
        base_url = f"http://127.0.0.1:{port}"
        service = self._start(
            "reservation_service",
            *("serve", "--port", str(port), "--workers", str(workers)),
            name=f"service-{port}",
            env={"RESERVATION_HOLD_SECONDS": str(hold_s)},
        )
        service.wait_ready(lambda: _answers(f"{base_url}/readyz"), READY_TIMEOUT_S)
        return base_url

    def run_pipeline(self, *, workers: int = 2, sweep_every_s: float = 1.0) -> None:
        """Start the sweeper of lapsed holds, the relay and the data platform's workers."""
        self._start(
            *("reservation_service", "expire-holds", "--every", str(sweep_every_s)), name="sweeper"
        )
        self._start("outbox_relay", "run", name="relay")
        for number in range(1, workers + 1):
            self._start("data_platform", "run", name=f"worker-{number}")
        wait_until(self._pipeline_runs, READY_TIMEOUT_S, "relay and workers to have begun")

    def _pipeline_runs(self) -> bool:
        """Whether the relay leads and every worker has its share of the partitions."""
        self.check_alive()
        signs = {"relay": '"leading"', "worker": '"partitions_placed"'}
        return all(
            sign in process.log.read_text("utf-8")
            for process in self.processes
            for kind, sign in signs.items()
            if process.name.startswith(kind)
        )

    def check_alive(self) -> None:
        """Raise when a part has ended by itself.

        Raises:
            DevstackError: with the end of its log.
        """
        for process in self.processes:
            if not process.alive:
                raise DevstackError(
                    f"{process.name} ended with code {process.exit_code}\n{process.log_tail()}"
                )

    def _start(
        self, package: str, *arguments: str, name: str, env: dict[str, str] | None = None
    ) -> Process:
        process = self._stack.program(package, *arguments, name=name, env=env)
        self._cleanup.callback(process.stop, STOP_TIMEOUT_S)
        self.processes.append(process)
        return process


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 - our own service
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def get_json(url: str) -> object:
    """Return the parsed answer to a GET of our own service."""
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - our own service
        return json.load(response)
