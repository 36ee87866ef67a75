"""The Flask application of one worker: routes, health, metrics, errors and security headers."""

import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import structlog
from flask import Flask, Request, Response, g, make_response, render_template, request
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface, SessionMixin
from psycopg_pool import ConnectionPool
from werkzeug.exceptions import HTTPException
from werkzeug.routing import IntegerConverter

from reservation_service import admin_api, api, metrics, openapi, pages, problems, sql
from reservation_service.api import Service
from reservation_service.config import Settings, is_loopback
from reservation_service.database import Connection
from reservation_service.problems import Problem

log = structlog.get_logger(__name__)

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


# Instead of Werkzeug's words, which are a browser's.
_DETAILS = {
    404: "There is no such page.",
    405: "The path knows other methods: see Allow.",
    413: "The body is larger than this call takes.",
}


class _Id(IntegerConverter):
    """Matches no more digits than an id has: what is longer is 404 for every method.

    A number that matches and is over its maximum would be 405 where a path knows several methods.
    """

    regex = r"[0-9]{1,18}"


class _GuestCookie(SecureCookieSessionInterface):
    """Marks the cookie Secure, except on a loopback address, where there is no TLS."""

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession | None:
        # What verifies a cookie takes 20 us to make, of the 800 of a booking.
        if self.get_cookie_name(app) not in request.cookies:
            return self.session_class()
        return super().open_session(app, request)

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        # Who comes with a token has no cookie, nor does his answer depend on one.
        if session.accessed:
            super().save_session(app, session, response)

    def get_cookie_secure(self, app: Flask) -> bool:  # noqa: ARG002 - Flask's signature
        try:
            return not is_loopback(urlsplit(f"//{request.host}").hostname or "")
        except ValueError:  # whatever it is, it is no loopback address
            return True


def create_app(
    settings: Settings,
    pool: ConnectionPool[Connection],
    *,
    outdated_schemas: frozenset[str],
    metrics_directory: Path | None = None,
) -> Flask:
    """Make the application.

    Args:
        settings: the checked environment.
        pool: an open pool of this process alone.
        outdated_schemas: what `alembic_version` says in a database that lacks a migration.
        metrics_directory: where all workers keep their metrics; None for a single process.
    """
    app = Flask(__name__)
    app.config.update(
        SECRET_KEY=settings.required("secret_key"),
        SECRET_KEY_FALLBACKS=settings.previous_secret_keys,
        MAX_CONTENT_LENGTH=api.BODY_MAX_BYTES,
        MAX_FORM_PARTS=1_000,
        SESSION_COOKIE_NAME="reservation_guest",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_REFRESH_EACH_REQUEST=False,
        # As long as browsers keep a cookie: concerts are sold many months ahead.
        PERMANENT_SESSION_LIFETIME=timedelta(days=400),
    )
    app.session_interface = _GuestCookie()
    app.url_map.converters["int"] = _Id
    app.extensions["reservation-service"] = Service.of(settings, pool)
    app.register_blueprint(api.blueprint)
    app.register_blueprint(admin_api.blueprint)
    app.register_blueprint(pages.blueprint)
    app.register_blueprint(openapi.blueprint)
    _add_health(app, pool, outdated_schemas, metrics_directory)
    _add_observation(app)
    app.register_error_handler(Exception, _answer_error)
    app.extensions["openapi"] = openapi.document(app, settings.max_seats_per_request)
    return app


def _add_health(
    app: Flask,
    pool: ConnectionPool[Connection],
    outdated_schemas: frozenset[str],
    metrics_directory: Path | None,
) -> None:
    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Say that it is alive."""
        return {"status": "alive"}

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        """Say whether Postgres is reachable and migrated."""
        try:
            with pool.connection() as connection:
                row = connection.execute(sql.SCHEMA_REVISION).fetchone()
        except psycopg.errors.UndefinedTable:
            row = None
        if row is None or row[0] in outdated_schemas:
            raise problems.unavailable("The database is not migrated: reservation-service migrate.")
        return {"status": "ready"}

    @app.get("/metrics")
    def show_metrics() -> Response:
        """Show the metrics of all workers."""
        text, content_type = metrics.render(metrics_directory)
        return Response(text, content_type=content_type)


def _add_observation(app: Flask) -> None:
    @app.before_request
    def start() -> None:
        g.started_s = time.monotonic()

    @app.after_request
    def finish(response: Response) -> Response:
        # The rule, not the path: ids would make a time series each.
        route = request.url_rule.rule if request.url_rule else "none"
        method = request.method if request.url_rule else "none"
        metrics.REQUESTS.labels(method, route, str(response.status_code)).inc()
        metrics.REQUEST_SECONDS.labels(method, route).observe(time.monotonic() - g.started_s)
        response.headers.extend(SECURITY_HEADERS)
        if request.blueprint in {"api", "admin", "pages"}:
            # Seats and reservations change by the second, and belong to one person.
            response.headers.setdefault("Cache-Control", "no-store")
        return response


def _answer_error(error: Exception) -> Response:
    problem = _problem_of(error)
    if request.path.startswith("/api/") or request.endpoint in {
        "healthz",
        "readyz",
        "show_metrics",
    }:
        response = Response(
            problem.body(), status=problem.status, content_type="application/problem+json"
        )
    else:
        response = make_response(render_template("problem.html", problem=problem), problem.status)
    response.headers.extend(problem.headers)
    return response


def _problem_of(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, psycopg.errors.LockNotAvailable | psycopg.errors.QueryCanceled) or (
        type(error) is TimeoutError  # see shared_looks.py
    ):
        return problems.unavailable("Too many want the same at once. Please try again.")
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | psycopg.InternalError):
        log.warning("the database failed a request", error=type(error).__name__, path=request.path)
        return problems.unavailable("The database is not available. Please try again.")
    if isinstance(error, BlockingIOError):  # see slow_clients.py
        return problems.malformed("The body did not arrive in time.")
    log.error("a request failed", path=request.path, **_told(error))
    return Problem(500, "internal-error", "Something went wrong on our side.")


def _told(error: BaseException) -> dict[str, Any]:
    """Return what the log says of an unexpected error.

    A database's message quotes the values that it refused: names, ids, whole rows. So of an error
    that comes from there the log has where it happened, not what it says.
    """
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, psycopg.Error):
            return {
                "error": type(cause).__name__,
                "sqlstate": cause.sqlstate,
                "constraint": cause.diag.constraint_name,
                "frames": traceback.format_tb(error.__traceback__),
            }
        cause = cause.__cause__ or cause.__context__
    return {"exc_info": error}


def _of_http(error: HTTPException) -> Problem:
    status = error.code or 500
    headers = dict(error.get_headers()) if status in {405, 429} else {}
    headers.pop("Content-Type", None)
    words = {
        400: "malformed-request",
        404: "not-found",
        405: "method-not-allowed",
        413: "too-large",
    }
    detail = _DETAILS.get(status) or error.description or error.name
    return Problem(status, words.get(status, "http-error"), detail, headers)
