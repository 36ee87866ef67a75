"""The API's description: /openapi.json (OpenAPI 3.1), and /docs to read it in a browser.

It is made from the application's routes, from the models that validate the bodies, and from the
structs that answers are made of. What can't be told from these stands in OPERATIONS; a test fails
when a route of the API is missing there.
"""

import re
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import msgspec
from flask import Blueprint, Flask, Response, current_app, render_template
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from reservation_service import api, problems
from reservation_service.admin_api import CancelledPerformance, SeatsToChange
from reservation_service.booking import ReservationAnswer
from reservation_service.catalogue import ConcertAnswer, SeatsAnswer
from reservation_service.catalogue_changes import Blocking
from reservation_service.new_concert import ConcertChange, NewConcert, PerformanceChange
from reservation_service.problems import KINDS

REF = "#/components/schemas/"
ABOUT = (
    "Concerts, performances and seats are public; the rest needs a caller. Times are RFC 3339 in "
    "UTC, money is integer minor units. Errors are RFC 9457 problems whose type is one of the "
    "words listed under Problems. Further members may appear in any answer."
)
HEALTH = ("healthz", "readyz", "show_metrics")
Schema = dict[str, Any]


class Operation(NamedTuple):
    """What a route doesn't tell of itself; `kinds` are problems beyond the usual ones."""

    answer: str | None = None
    caller: Literal["anybody", "customer", "admin"] = "anybody"
    body: type[BaseModel] | None = None
    creates: bool = False
    pages: bool = False
    kinds: tuple[str, ...] = ()


_BOOKING = ("not-found", "seats-unavailable", "not-on-sale", "customer-limit")
_CHANGE = Operation("ReservationAnswer", "customer", kinds=("not-found", "wrong-state"))
OPERATIONS = {
    "api.list_concerts": Operation("ConcertAnswer", pages=True),
    "api.read_concert": Operation("ConcertAnswer", kinds=("not-found",)),
    "api.publish_concert": Operation(
        "ConcertAnswer", "admin", NewConcert, creates=True, kinds=("event-too-large",)
    ),
    "admin.change_concert": Operation(
        "ConcertAnswer", "admin", ConcertChange, kinds=("not-found", "event-too-large")
    ),
    "admin.change_performance": Operation(
        "ConcertAnswer", "admin", PerformanceChange, kinds=("not-found", "not-on-sale")
    ),
    "admin.block_seats": Operation(
        "Blocking", "admin", SeatsToChange, kinds=("not-found", "seats-unavailable")
    ),
    "admin.release_seats": Operation(
        "Blocking", "admin", SeatsToChange, kinds=("not-found", "seats-unavailable")
    ),
    "admin.cancel_performance": Operation("CancelledPerformance", "admin", kinds=("not-found",)),
    "api.read_seats": Operation("SeatsAnswer", kinds=("not-found",)),
    "api.reserve": Operation(
        "ReservationAnswer", "customer", api.NewReservation, creates=True, kinds=_BOOKING
    ),
    "api.reserve_best": Operation(
        "ReservationAnswer", "customer", api.BestAvailable, creates=True, kinds=_BOOKING
    ),
    "api.list_reservations": Operation("ReservationAnswer", "customer", pages=True),
    "api.read_reservation": Operation("ReservationAnswer", "customer", kinds=("not-found",)),
    "api.confirm": _CHANGE,
    "api.cancel": _CHANGE,
    "api.extend": _CHANGE,
    "healthz": Operation("Health"),
    "readyz": Operation("Health"),
    "show_metrics": Operation(),
}
SECURITY: dict[str, list[dict[str, list[str]]]] = {
    "anybody": [],
    "customer": [{"customer": []}, {"guest": []}],
    "admin": [{"admin": []}],
}
SECURITY_SCHEMES = {
    "customer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "HS256, or RS256 and ES256 by the operator's JWKS; aud, sub and exp.",
    },
    "guest": {
        "type": "apiKey",
        "in": "cookie",
        "name": "reservation_guest",
        "description": "The booking page's cookie; for writes only from the service's own origin.",
    },
    "admin": {"type": "http", "scheme": "bearer", "description": "RESERVATION_ADMIN_TOKEN"},
}

blueprint = Blueprint("openapi", __name__)


@blueprint.get("/openapi.json")
def show_document() -> Response:
    """Show the description for programs."""
    return Response(
        msgspec.json.encode(current_app.extensions["openapi"]), mimetype="application/json"
    )


@blueprint.get("/docs")
def show_page() -> str:
    """Show the description for people."""
    return render_template("docs.html", document=current_app.extensions["openapi"], kinds=KINDS)


def document(app: Flask, max_seats_per_request: int) -> Schema:
    """Describe the application's API."""
    paths: dict[str, Schema] = {}
    for rule in app.url_map.iter_rules():
        if rule.endpoint.startswith(("api.", "admin.")) or rule.endpoint in HEALTH:
            path = re.sub(r"<(?:[^<>]+:)?(\w+)>", r"{\1}", rule.rule)
            (method,) = (rule.methods or set()) - {"HEAD", "OPTIONS"}
            described = _operation(app, rule.endpoint, sorted(rule.arguments), method)
            paths.setdefault(path, {})[method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Concert reservation",
            "version": version("concert-reservation"),
            "description": ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "securitySchemes": SECURITY_SCHEMES,
            "schemas": _schemas(max_seats_per_request),
        },
    }


def _operation(app: Flask, endpoint: str, arguments: list[str], method: str) -> Schema:
    about = OPERATIONS.get(endpoint, Operation())
    summary = (app.view_functions[endpoint].__doc__ or "").strip().splitlines()[0]
    described: Schema = {
        "operationId": endpoint.partition(".")[2] or endpoint,
        "summary": summary,
        "security": SECURITY[about.caller],
        "parameters": [_path_parameter(name) for name in arguments] + _more_parameters(about),
        "responses": _responses(endpoint, about, method),
    }
    if about.body:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(about.body.__name__)}},
        }
    return described


def _path_parameter(name: str) -> Schema:
    integer = {"type": "integer", "minimum": 1, "maximum": api.ID_MAX}
    schema = {"type": "string", "format": "uuid"} if name == "reservation_id" else integer
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _more_parameters(about: Operation) -> list[Schema]:
    parameters: list[Schema] = []
    if about.pages:
        limit = {"type": "integer", "minimum": 1, "maximum": api.PAGE_MAX}
        limit |= {"default": api.PAGE_DEFAULT}
        cursor = {"type": "string", "description": "next_cursor of the page before"}
        parameters += [
            {"name": "limit", "in": "query", "schema": limit},
            {"name": "cursor", "in": "query", "schema": cursor},
        ]
    if about.creates:
        key = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[\x20-\x7e]+$"}
        text = "Makes it safe to repeat for 24 hours: the first 201 comes again."
        parameters.append(
            {"name": "Idempotency-Key", "in": "header", "schema": key, "description": text}
        )
    return parameters


def _responses(endpoint: str, about: Operation, method: str) -> Schema:
    kinds = [*about.kinds, *(["malformed-request"] if about.pages or about.body else [])]
    if about.caller != "anybody":
        kinds += ["unauthenticated", "forbidden"]
    if method == "POST" and about.caller == "customer":
        kinds += ["too-many-writes"]
    if about.body:
        kinds += ["invalid-body", "too-large"]
    if about.creates:
        kinds += ["key-reused", "request-in-flight"]
    if endpoint != "healthz":
        kinds += ["unavailable"]
    by_status: dict[str, list[str]] = {}
    for kind in kinds:
        by_status.setdefault(str(KINDS[kind].status), []).append(kind)
    refusals = {status: _refusal(of_status) for status, of_status in sorted(by_status.items())}
    return _success(endpoint, about) | refusals


def _success(endpoint: str, about: Operation) -> Schema:
    if about.answer is None:
        text = {"text/plain": {"schema": {"type": "string"}}}
        return {"200": {"description": "Prometheus' text format", "content": text}}
    schema = _ref(about.answer)
    if about.pages:
        cursor = {"anyOf": [{"type": "string"}, {"type": "null"}]}
        members = {"items": {"type": "array", "items": schema}, "next_cursor": cursor}
        schema = {"type": "object", "required": ["items", "next_cursor"], "properties": members}
    answer: Schema = {
        "description": "Made" if about.creates else "As asked",
        "content": {"application/json": {"schema": schema}},
    }
    if about.creates:
        answer["headers"] = {
            "Location": _header("Where it is"),
            "Idempotency-Replayed": _header("`true` when an earlier call made it"),
        }
    if endpoint == "api.read_seats":
        answer["headers"] = {"ETag": _header("For If-None-Match")}
        return {"200": answer, "304": {"description": "All as If-None-Match knows it"}}
    if endpoint == "admin.cancel_performance":
        return {"200": answer, "202": answer | {"description": "Not all of them yet"}}
    return {"201" if about.creates else "200": answer}


def _header(text: str) -> Schema:
    return {"description": text, "schema": {"type": "string"}}


def _refusal(kinds: list[str]) -> Schema:
    retried = (
        {"Retry-After": _header("Seconds")}
        if {"503", "429"} & {str(KINDS[kind].status) for kind in kinds}
        else {}
    )
    schema = {
        "allOf": [
            _ref("Problem"),
            {"properties": {"type": {"enum": kinds}}},
        ]
    }
    return {
        "description": " or ".join(kinds),
        "content": {"application/problem+json": {"schema": schema}},
    } | ({"headers": retried} if retried else {})


def _ref(name: str) -> Schema:
    return {"$ref": REF + name}


def _schemas(max_seats_per_request: int) -> Schema:
    structs = [ReservationAnswer, ConcertAnswer, SeatsAnswer, Blocking, CancelledPerformance]
    _, answers = msgspec.json.schema_components(structs, ref_template=REF + "{name}")
    for schema in answers.values():
        for name, member in schema.get("properties", {}).items():
            if name.endswith("_at"):
                member.update(_time(member))
    bodies = [operation.body for operation in OPERATIONS.values() if operation.body]
    _, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=REF + "{model}"
    )
    schemas: Schema = (
        dict(found["$defs"])
        | dict(answers)
        | {
            "Health": {
                "type": "object",
                "required": ["status"],
                "properties": {"status": {"enum": ["alive", "ready"]}},
            },
            "Problem": problems.SCHEMA,
        }
    )
    schemas["NewReservation"]["properties"]["seat_ids"]["maxItems"] = max_seats_per_request
    schemas["BestAvailable"]["properties"]["count"]["maximum"] = max_seats_per_request
    return dict(sorted(schemas.items()))


def _time(member: Schema) -> Schema:
    time = {"type": "string", "format": "date-time"}
    return {"anyOf": [time, {"type": "null"}]} if "anyOf" in member else time
