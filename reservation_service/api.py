"""The HTTP API under /api: reads requests, asks booking and catalogue, writes JSON."""

import base64
import binascii
import gzip
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from flask import Blueprint, Request, Response, current_app, request, session
from psycopg_pool import ConnectionPool
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from werkzeug.exceptions import RequestEntityTooLarge

from reservation_service import (
    best_available,
    booking,
    callers,
    catalogue,
    catalogue_changes,
    events,
    idempotency,
    metrics,
    problems,
    sql,
)
from reservation_service.best_available import Wanted
from reservation_service.booking import Order, Terms
from reservation_service.callers import Secrets
from reservation_service.config import Settings
from reservation_service.database import Connection
from reservation_service.idempotency import Answer, Key
from reservation_service.jwks import KeySet
from reservation_service.new_concert import NewConcert
from reservation_service.problems import Problem
from reservation_service.seat_map import SeatMaps

BODY_MAX_BYTES = 65_536
CONCERT_BODY_MAX_BYTES = 4_194_304
ID_MAX = 2**63 - 1
PAGE_DEFAULT, PAGE_MAX = 50, 200
IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")

blueprint = Blueprint("api", __name__, url_prefix="/api")


@dataclass(frozen=True)
class Service:
    """What requests work with; one in each worker."""

    pool: ConnectionPool[Connection]
    secrets: Secrets
    terms: Terms
    max_seats_per_request: int
    writes_per_minute: int
    seat_maps: SeatMaps

    @contextmanager
    def writing(self, customer_id: str) -> Iterator[Connection]:
        """Lend a connection for a write of this customer; 0 writes a minute means no limit.

        What counts is the attempt, in all workers together, in the minute of Postgres' clock.

        Raises:
            Problem: 429, the customer has had his writes of this minute.
        """
        with self.pool.connection() as connection:
            if self.writes_per_minute:
                counted = connection.execute(sql.COUNT_WRITE, {"customer_id": customer_id})
                writes, rest_s = counted.fetchone() or (0, 0)
                if writes > self.writes_per_minute:
                    raise problems.too_many_writes(self.writes_per_minute, max(1, rest_s))
            yield connection

    @classmethod
    def of(cls, settings: Settings, pool: ConnectionPool[Connection]) -> "Service":
        """Take from the settings what requests need."""
        admin = settings.admin_token
        source = settings.jwks_file or (str(settings.jwks_url) if settings.jwks_url else None)
        return cls(
            pool=pool,
            secrets=Secrets(
                (settings.required("secret_key"), *settings.previous_secret_keys),
                admin.get_secret_value() if admin else None,
                KeySet(source) if source else None,
            ),
            terms=Terms(
                timedelta(seconds=settings.hold_seconds),
                settings.max_seats_per_customer,
                timedelta(seconds=settings.hold_max_seconds),
            ),
            max_seats_per_request=settings.max_seats_per_request,
            writes_per_minute=settings.writes_per_minute,
            seat_maps=SeatMaps(pool),
        )


Id = Annotated[int, Field(ge=1, le=ID_MAX)]


class NewReservation(BaseModel):
    """Body of `POST /api/reservations`. Unknown members are refused: they may be a typing error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    performance_id: Id
    seat_ids: list[Id] = Field(min_length=1, json_schema_extra={"uniqueItems": True})
    confirm: bool = False

    @field_validator("seat_ids")
    @classmethod
    def _distinct_ids(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seat is named twice")
        return value


class BestAvailable(BaseModel):
    """Body of `POST /api/performances/{id}/best-available`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    count: int = Field(ge=1)
    confirm: bool = False


class Page(NamedTuple):
    """Which part of a list is wanted: up to `limit` items after `cursor`."""

    limit: int
    cursor: str | None


def service() -> Service:
    """Return this worker's Service."""
    found: Service = current_app.extensions["reservation-service"]
    return found


@contextmanager
def counted(action: str) -> Iterator[None]:
    """Count what comes of a change of a reservation."""
    try:
        yield
    except Problem as problem:
        metrics.CHANGES.labels(action, str(problem.status)).inc()
        raise
    metrics.CHANGES.labels(action, "done").inc()


@blueprint.get("/concerts")
def list_concerts() -> Response:
    """List concerts by id."""
    page = _page(request)
    after = 0 if page.cursor is None else _decoded(page.cursor, _concert_id)
    with service().pool.connection() as connection:
        found = catalogue.read_concerts(connection, page.limit + 1, after)
    return _list(page, found, lambda concert: str(concert.concert_id))


@blueprint.get(f"/concerts/<int(max={ID_MAX}):concert_id>")
def read_concert(concert_id: int) -> Response:
    """Show one concert."""
    with service().pool.connection() as connection:
        return json_answer(catalogue.read_concert(connection, concert_id))


@blueprint.post("/concerts")
def publish_concert() -> Response:
    """Publish a concert with its performances and seats (admin)."""
    request.max_content_length = CONCERT_BODY_MAX_BYTES
    callers.require_admin(request, session, service().secrets)
    concert = body_of(NewConcert)
    key = _idempotency_key("admin", "publish-concert", concert)
    with service().pool.connection() as connection:
        return _created(catalogue_changes.publish(connection, concert, key, traceparent()))


@blueprint.get(f"/performances/<int(max={ID_MAX}):performance_id>/seats")
def read_seats(performance_id: int) -> Response:
    """Show all seats of a performance."""
    known = request.if_none_match
    tag, body = service().seat_maps.show(performance_id, known.contains_weak)
    if body is None:
        response = Response(status=304)
        response.headers.remove("Content-Type")
    elif request.accept_encodings.quality("gzip") > 0:
        response = Response(body, mimetype="application/json")
        response.content_encoding = "gzip"
    else:
        response = Response(gzip.decompress(body), mimetype="application/json")
    # Weak: it is the same for what is compressed and what isn't.
    response.set_etag(tag, weak=True)
    response.vary.add("Accept-Encoding")
    # May be kept, but not be shown without having asked.
    response.cache_control.no_cache = True
    return response


@blueprint.post("/reservations")
def reserve() -> Response:
    """Hold seats, or book them in one step."""
    customer_id = _customer()
    body = body_of(NewReservation)
    _check_count("seat_ids", len(body.seat_ids))
    order = Order(customer_id, body.performance_id, body.seat_ids, body.confirm)
    key = _idempotency_key(customer_id, "reserve", body)
    with (
        counted("book" if body.confirm else "hold"),
        service().writing(customer_id) as connection,
    ):
        answer = booking.book(connection, order, service().terms, key, traceparent())
    return _created(answer)


@blueprint.post(f"/performances/<int(max={ID_MAX}):performance_id>/best-available")
def reserve_best(performance_id: int) -> Response:
    """Hold the best seats that are free, or book them in one step."""
    customer_id = _customer()
    body = body_of(BestAvailable)
    _check_count("count", body.count)
    wanted = Wanted(customer_id, performance_id, body.count, body.confirm)
    key = _idempotency_key(customer_id, "reserve-best", body, performance_id)
    with (
        counted("book" if body.confirm else "hold"),
        service().writing(customer_id) as connection,
    ):
        answer = best_available.book(connection, wanted, service().terms, key, traceparent())
    return _created(answer)


@blueprint.get("/reservations")
def list_reservations() -> Response:
    """List the caller's own reservations, newest first."""
    customer_id = _customer()
    page = _page(request)
    before = booking.UUID_MAX if page.cursor is None else _decoded(page.cursor, UUID)
    with service().pool.connection() as connection:
        found = booking.newest(connection, customer_id, page.limit + 1, before)
    answers = [booking.answer_of(reservation) for reservation in found]
    return _list(page, answers, lambda reservation: reservation.reservation_id)


@blueprint.get("/reservations/<reservation_id>")
def read_reservation(reservation_id: str) -> Response:
    """Show one of the caller's reservations."""
    customer_id = _customer()
    wanted = reservation_uuid(reservation_id)
    with service().pool.connection() as connection:
        return json_answer(booking.answer_of(booking.find(connection, wanted, customer_id)))


@blueprint.post("/reservations/<reservation_id>/confirm")
def confirm(reservation_id: str) -> Response:
    """Confirm a hold."""
    return _change("confirm", booking.confirm, reservation_id)


@blueprint.post("/reservations/<reservation_id>/cancel")
def cancel(reservation_id: str) -> Response:
    """Cancel a hold or a reservation."""
    return _change("cancel", booking.cancel, reservation_id)


@blueprint.post("/reservations/<reservation_id>/extend")
def extend(reservation_id: str) -> Response:
    """Let a hold last longer."""
    return _change("extend", partial(booking.extend, terms=service().terms), reservation_id)


def reservation_uuid(text: str) -> UUID:
    """Read a reservation id in the one form in which it is given out.

    Raises:
        Problem: 404, for there can be no such reservation.
    """
    try:
        value = UUID(text)
    except ValueError:
        raise problems.not_found("reservation") from None
    if str(value) != text:
        raise problems.not_found("reservation")
    return value


def _change(
    action: str,
    change: Callable[[Connection, UUID, str, str | None], events.Reservation],
    reservation_id: str,
) -> Response:
    customer_id = _customer()
    wanted = reservation_uuid(reservation_id)
    with counted(action), service().writing(customer_id) as connection:
        changed = change(connection, wanted, customer_id, traceparent())
    return json_answer(booking.answer_of(changed))


def _customer() -> str:
    return callers.require_customer(request, session, service().secrets)


def traceparent() -> str | None:
    """Return the request's trace context: as it came, or our own span's (tracing.py)."""
    return request.headers.get("traceparent")


def body_of(model: type[Model]) -> Model:
    """Read the request's body.

    Raises:
        Problem: 400 it is no JSON, 422 it is against the model.
        RequestEntityTooLarge: 413.
    """
    data = request.get_data(cache=False)
    # A chunked body is cut at the limit without a word.
    if request.content_length is None and len(data) >= (request.max_content_length or 0):
        raise RequestEntityTooLarge
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] == "json_invalid":
            raise problems.malformed("The body is no valid JSON.") from None
        raise problems.invalid(problems.told_by(error)) from None


def _check_count(location: str, count: int) -> None:
    most = service().max_seats_per_request
    if count > most:
        raise problems.invalid(
            [{"location": location, "message": f"at most {most} seats in one request"}]
        )


def _idempotency_key(
    caller: str, operation: str, body: BaseModel, of: int | None = None
) -> Key | None:
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise problems.malformed("Idempotency-Key: expected 1 to 255 printable ASCII characters.")
    # What the body says counts, not how it is spaced; and the object in the path.
    said = body.model_dump_json() if of is None else f"{of} {body.model_dump_json()}"
    return Key(caller, operation, key, idempotency.fingerprint(said.encode()))


def _page(request: Request) -> Page:
    text = request.args.get("limit", str(PAGE_DEFAULT))
    if not re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) or not 1 <= int(text) <= PAGE_MAX:
        raise problems.malformed(f"limit: expected an integer from 1 to {PAGE_MAX}.")
    return Page(int(text), request.args.get("cursor"))


def _decoded(cursor: str, read: Callable[[str], Value]) -> Value:
    try:
        return read(base64.b64decode(cursor, altchars=b"-_", validate=True).decode("ascii"))
    except (ValueError, binascii.Error):
        raise problems.malformed("cursor: expected a next_cursor of this list.") from None


def _concert_id(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII) or int(text) > ID_MAX:
        raise ValueError(text)
    return int(text)


def _list(page: Page, found: list[Value], id_of: Callable[[Value], str]) -> Response:
    items, more = found[: page.limit], found[page.limit :]
    cursor = base64.urlsafe_b64encode(id_of(items[-1]).encode()).decode() if more else None
    return json_answer({"items": items, "next_cursor": cursor})


def _created(answer: Answer) -> Response:
    response = Response(answer.body, status=201, mimetype="application/json")
    response.headers["Location"] = answer.location
    if answer.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return response


def json_answer(value: Any) -> Response:
    """Answer 200 with this as JSON."""
    return Response(msgspec.json.encode(value), mimetype="application/json")
