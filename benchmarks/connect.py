"""Kafka Connect in one JVM, standalone or distributed, for the peers that run in it."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self

from benchmarks.surroundings import Surroundings
from devstack import java
from devstack.kafka import LOG_OPTIONS
from devstack.processes import Process
from devstack.state import free_port

JAVA_OPTIONS = [
    # As Connect's own start script has them.
    *("-Xms256M", "-Xmx2G", "-server", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20"),
    *("-XX:InitiatingHeapOccupancyPercent=35", "-XX:+ExplicitGCInvokesConcurrent"),
]
START_TIMEOUT_S = 90.0
REQUEST_TIMEOUT_S = 30.0

WORKER = {
    "connector.client.config.override.policy": "All",
    "plugin.discovery": "hybrid_warn",
    "offset.flush.interval.ms": "5000",
}
# Only a distributed worker can publish exactly once. What it knows is in three topics; where only
# one worker is left, waiting five minutes for another to come back would help nobody.
DISTRIBUTED = {
    "group.id": "bench-connect",
    **{
        f"{kind}.storage.{name}": value
        for kind in ("config", "offset", "status")
        for name, value in (("topic", f"bench-connect-{kind}"), ("replication.factor", "1"))
    },
    "scheduled.rebalance.max.delay.ms": "0",
    "exactly.once.source.support": "enabled",
}


class Connect:
    """Kafka Connect in one JVM. A context manager.

    Args:
        around: the servers.
        title: what it is for, as a person is told.
        pom: its jars,
        folder: and the cache's folder for them.
        settings: of the worker, beside WORKER.
        distributed: whether it is a distributed worker, alone in its group.
    """

    def __init__(
        self,
        around: Surroundings,
        title: str,
        pom: Path,
        folder: str,
        settings: Mapping[str, str],
        *,
        distributed: bool = False,
    ) -> None:
        self._around = around
        self._title = title
        self._pom = pom
        self._folder = folder
        self._settings = settings
        self._distributed = distributed
        self._port = free_port()
        self._command: list[str | Path] = []
        # Standalone Connect knows after its end only what stands in a file.
        self._connectors: dict[str, Path] = {}
        self._process: Process | None = None

    def __enter__(self) -> Self:
        run = self._around.stack.run
        version = java.kafka_version()
        with self._around.steps.step(f"{self._title} in Kafka Connect {version}") as step:
            jars = java.jars_of(self._pom, f"{self._folder}-connect-{version}", run, step.note)
            program, _ = java.java_and_jars(run, step.note)
            self.prepare()
            settings = run.path / "connect.properties"
            settings.write_text(_properties(self._worker_settings()), encoding="utf-8")
            self._command = [
                *(program, f"-Djava.io.tmpdir={run.path}", "-XX:-UsePerfData"),
                *(*JAVA_OPTIONS, *LOG_OPTIONS, "-cp", f"{jars}/*"),
                f"org.apache.kafka.connect.cli.Connect{self._kind}",
                settings,
            ]
            self.launch()
            self.process.wait_ready(self._answers, START_TIMEOUT_S)
        return self

    def launch(self) -> None:
        """Start the JVM without waiting: again, with the connectors that it had."""
        run = self._around.stack.run
        files = [] if self._distributed else self._connectors.values()
        self._process = Process(
            [*self._command, *files],
            name="Kafka Connect",
            log=run.path / "connect.log",
            keep_fds=[run.lock_fd],
        )

    def __exit__(self, *_: object) -> None:
        self.process.stop()

    @property
    def process(self) -> Process:
        """The JVM."""
        assert self._process  # noqa: S101 - within the block
        return self._process

    @property
    def _kind(self) -> str:
        return "Distributed" if self._distributed else "Standalone"

    def prepare(self) -> None:
        """Do what has to be done before the JVM starts."""

    def create(self, name: str, config: Mapping[str, str]) -> None:
        """Make a connector, which is there again when the JVM is started again.

        Raises:
            RuntimeError: Connect refused it.
        """
        path = self._around.stack.run.path / f"connector-{name}.properties"
        path.touch(mode=0o600)
        path.write_text(_properties({"name": name, **config}), encoding="utf-8")
        self._connectors[name] = path
        self.call("POST", "/connectors", {"name": name, "config": dict(config)})

    def delete(self, name: str) -> None:
        """End a connector for good.

        Raises:
            RuntimeError: Connect refused it.
        """
        self._connectors.pop(name).unlink()
        self.call("DELETE", f"/connectors/{name}")

    def restart_failed(self) -> int:
        """Start again what has failed of the connectors, as a person would; return how much."""
        failed = 0
        for name in list(self._connectors):
            try:
                found = self.call("GET", f"/connectors/{name}/status")
                states = [part["state"] for part in (found["connector"], *found["tasks"])]
                if "FAILED" in states:
                    options = "includeTasks=true&onlyFailed=true"
                    self.call("POST", f"/connectors/{name}/restart?{options}")
                    failed += states.count("FAILED")
            except RuntimeError:  # the JVM is away, or has just begun
                continue
        return failed

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Ask Connect's REST interface.

        Raises:
            RuntimeError: it refused, or is not there.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:  # noqa: S310 - our own JVM
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"Kafka Connect: {method} {path}: {error.read()[:500]!r}") from error
        except (OSError, HTTPException) as error:  # urllib's are OSErrors
            raise RuntimeError(f"Kafka Connect: {method} {path}: {error}") from error
        return json.loads(text) if text else None

    def _answers(self) -> bool:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self._port)):
                return False
        try:
            return bool(self.call("GET", "/connectors") == [])
        except RuntimeError:
            return False

    def _worker_settings(self) -> dict[str, str]:
        offsets = {"offset.storage.file.filename": f"{self._around.stack.run.path}/connect.offsets"}
        return (
            WORKER
            | (DISTRIBUTED if self._distributed else offsets)
            | dict(self._settings)
            | {
                "bootstrap.servers": self._around.bootstrap_servers,
                "listeners": f"http://127.0.0.1:{self._port}",
            }
        )


def _properties(settings: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in settings.items())
