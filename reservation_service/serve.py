"""Serve the application: gunicorn with threads, a pool in each worker, metrics of all of them.

SIGTERM stops listening, finishes what is in flight within `GRACEFUL_TIMEOUT_S`, exits 0. The
choice of the server is in docs/decisions/0003-wsgi-server.md.
"""

import logging
import os
import resource
import select
import shutil
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask
from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.config import Config  # type: ignore[import-untyped]
from gunicorn.glogging import Logger  # type: ignore[import-untyped]

import migrations
from reservation_service.config import ConfigurationError, Settings, is_loopback
from reservation_service.database import make_pool
from reservation_service.slow_clients import Worker

if TYPE_CHECKING:
    from reservation_service.tracing import Traces

THREADS_PER_WORKER = 8
GRACEFUL_TIMEOUT_S = 8
WORKER_TIMEOUT_S = 30
KEEP_ALIVE_S = 15
# An on-sale: thousands come in the same second, and are answered one after the other.
CONNECTIONS_PER_WORKER = 4_096
BACKLOG_CONNECTIONS = 4_096
# Beside those of clients: the database's, metrics, logs.
OTHER_FILES = 256


class _JsonLogger(Logger):  # type: ignore[misc]
    """Leaves gunicorn's records to our handler on the root logger."""

    def setup(self, cfg: Config) -> None:
        self.cfg = cfg
        self._access_log_enabled = False
        self.loglevel = logging.getLogger().level
        for logger in (self.error_log, self.access_log):
            logger.handlers.clear()
            logger.propagate = True


class _Worker(Worker):
    """Stops listening before it finishes what is in flight, not after.

    Else clients that reconnect during the drain wait in the backlog and are reset at its end.
    """

    sockets: list[socket.socket]

    def set_accept_enabled(self, enabled: bool) -> None:  # noqa: FBT001 - gunicorn's signature
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive:
            self.hurry()
            for listener in self.sockets:
                for _ in range(BACKLOG_CONNECTIONS):  # who waits already is still served
                    if not select.select([listener], [], [], 0)[0]:
                        break
                    self.accept(listener)
                listener.close()
            self.sockets = []


class _Server(BaseApplication):  # type: ignore[misc]
    def __init__(self, options: dict[str, Any], settings: Settings, metrics: Path) -> None:
        self._options = options
        self._settings = settings
        self._metrics = metrics
        # Once, before the fork: reading the revisions takes Alembic half a second.
        self._outdated_schemas = migrations.outdated("reservations")
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Make the application; gunicorn calls this in the worker, after the fork."""
        from reservation_service.app import create_app  # noqa: PLC0415 - imports the metrics
        from reservation_service.pool import MeasuredPool  # noqa: PLC0415 - as do these

        url = self._settings.required("database_url")
        pool = make_pool(url, THREADS_PER_WORKER, MeasuredPool)
        pool.open(wait=False)
        ends_with_it = ExitStack()
        ends_with_it.callback(pool.close)
        self.cfg.set("worker_exit", lambda _server, _worker: ends_with_it.close())
        app = create_app(
            self._settings,
            pool,
            outdated_schemas=self._outdated_schemas,
            metrics_directory=self._metrics,
        )
        if traces := _traces(self._settings):
            ends_with_it.callback(traces.close)
            traces.follow(app)
        return app


def _traces(settings: Settings) -> "Traces | None":
    """Return where spans go; None when traces are off, which nothing is imported for."""
    if settings.traces_variable is None:
        return None
    try:
        from reservation_service.tracing import Traces  # noqa: PLC0415

        return Traces()
    except ImportError as error:
        raise ConfigurationError(
            f"{settings.traces_variable} is set, but OpenTelemetry is not installed: expected "
            "what requirements/tracing.txt pins, the extra concert-reservation[tracing]"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"an OTEL_ variable has a wrong value: {error}") from error


def _allow_files(wanted: int) -> int:
    """Let this process and its workers open so many files, or as many as it may; return which."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _forget(process_id: int, folder: str) -> None:
    """Leave a worker that has ended, also by a kill, out of the gauges; keep its counts."""
    from prometheus_client.multiprocess import (  # noqa: PLC0415 - after the directory is named
        mark_process_dead,
    )

    mark_process_dead(process_id, folder)  # type: ignore[no-untyped-call]


def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Serve until SIGTERM or SIGINT; ends the process.

    Raises:
        ConfigurationError: a variable that serving needs is missing or wrong.
    """
    settings.required("database_url")
    settings.required("secret_key")
    if traces := _traces(settings):
        traces.close()  # tried here, where what is wrong can be told in a line
    if not is_loopback(host):
        settings.check_for_strangers()
    folder = tempfile.mkdtemp(prefix="reservation-service-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    options = {
        "bind": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "workers": workers,
        "worker_class": _Worker,
        "threads": THREADS_PER_WORKER,
        "worker_connections": _allow_files(CONNECTIONS_PER_WORKER + OTHER_FILES) - OTHER_FILES,
        "timeout": WORKER_TIMEOUT_S,
        "graceful_timeout": GRACEFUL_TIMEOUT_S,
        "keepalive": KEEP_ALIVE_S,
        "backlog": BACKLOG_CONNECTIONS,
        "control_socket_disable": True,
        "logger_class": _JsonLogger,
        "proc_name": "reservation-service",
        "child_exit": lambda _master, worker: _forget(worker.pid, folder),
        # By the master alone: a worker that ends would take the others' metrics along.
        "on_exit": lambda _master: shutil.rmtree(folder, ignore_errors=True),
    }
    _Server(options, settings, Path(folder)).run()
