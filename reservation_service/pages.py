"""The booking pages: plain HTML forms over the same transactions as the API; work without script.

Guarantees:
- Everything but the live map is done by forms; with script (static/page.js) the seats are the same
  check boxes, kept up to date.
- A guest is known by a signed cookie, made when the first form is shown. Each form carries a token
  that is bound to this cookie (no other site knows it) and an Idempotency-Key of its own, so that
  a double click or a reload reserves once.
- A reservation is shown to its guest, and to a browser in which its code was entered; nobody else.
- Nothing comes from elsewhere, and a page of 5,000 seats is less than 100 kB on its way.
"""

import gzip
import hmac
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Protocol
from uuid import UUID

from flask import Blueprint, Response, make_response, redirect, render_template, request, session
from flask.blueprints import BlueprintSetupState
from werkzeug import Response as AnyResponse

from reservation_service import (
    best_available,
    booking,
    catalogue,
    codes,
    hall,
    idempotency,
    language,
    problems,
    seat_map,
    sql,
)
from reservation_service.api import ID_MAX, IDEMPOTENCY_KEY, counted, reservation_uuid, service
from reservation_service.best_available import Wanted
from reservation_service.booking import Order, Stored
from reservation_service.callers import CUSTOMER_ID
from reservation_service.catalogue import ConcertAnswer, Place
from reservation_service.database import Connection
from reservation_service.events import Reservation
from reservation_service.idempotency import Key
from reservation_service.problems import Problem

PAGE_CONCERTS = 20
PAGE_RESERVATIONS = 50
FOUND_RESERVATIONS = 20
COMPRESS_FROM_BYTES = 1_024
COMPRESSION_LEVEL = 6
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Microseconds of EPOCH until 2286, and an id.
PLACE = re.compile(r"([0-9]{1,16})-([0-9]{1,18})", re.ASCII)

_Change = Callable[[Connection, UUID, str], Reservation]

blueprint = Blueprint("pages", __name__)


class _Window(Protocol):
    """What says whether a performance is on sale."""

    @property
    def starts_at(self) -> datetime: ...
    @property
    def sales_open_at(self) -> datetime: ...
    @property
    def sales_close_at(self) -> datetime: ...
    @property
    def status(self) -> str: ...


@blueprint.record_once
def _give_words(state: BlueprintSetupState) -> None:
    """Let the templates speak, that of an error outside these pages too."""
    state.app.jinja_env.globals.update(
        _=language.translate,
        _n=language.translate_plural,
        languages=language.NAMES,
        language=language.current,
    )
    state.app.jinja_env.filters.update(
        money=language.money,
        day=language.day,
        clock=language.clock,
        moment=language.moment,
        place=language.place,
        told=language.told,
    )


@blueprint.before_request
def _switch_language() -> AnyResponse | None:
    """Remember the language that somebody chose, and show the same page in it."""
    chosen = request.args.get("lang")
    if request.method != "GET" or chosen not in language.NAMES:
        return None
    response = redirect(request.path, 303)
    response.set_cookie(
        language.COOKIE, chosen, max_age=language.COOKIE_MAX_AGE_S, httponly=True, samesite="Lax"
    )
    return response


@blueprint.after_request
def _compress(response: Response) -> Response:
    response.vary.update(["Accept-Encoding", "Accept-Language", "Cookie"])
    accepted = request.accept_encodings.quality("gzip") > 0
    if accepted and response.mimetype == "text/html":
        body = response.get_data()
        if len(body) >= COMPRESS_FROM_BYTES:
            response.set_data(gzip.compress(body, COMPRESSION_LEVEL, mtime=0))
            response.content_encoding = "gzip"
    response.headers["Content-Language"] = language.current()
    return response


@blueprint.get("/")
def concerts() -> str:
    """List what is still to come, the next first."""
    with service().pool.connection() as connection:
        now = _now(connection)
        after = _place_of(request.args.get("after", ""), now)
        found = catalogue.read_concerts_to_come(connection, PAGE_CONCERTS + 1, now, after)
    shown = found[:PAGE_CONCERTS]
    more = _place_text(shown[-1], now) if len(found) > PAGE_CONCERTS else None
    return render_template(
        "concerts.html", concerts=shown, more=more, sale=partial(sale_state, now)
    )


@blueprint.get(f"/performances/<int(max={ID_MAX}):performance_id>")
def performance(performance_id: int) -> Response:
    """Show the seats of a performance as a form."""
    return _seats_page(performance_id)


@blueprint.post(f"/performances/<int(max={ID_MAX}):performance_id>")
def hold(performance_id: int) -> AnyResponse:
    """Hold the chosen seats, or the best."""
    guest_id = _guest_of_form()
    action = request.form.get("action", "")
    if action not in {"hold", "best"}:
        raise problems.malformed("Expected to hold seats or the best ones.")
    chosen = sorted({int(text) for text in request.form.getlist("seat_ids") if _is_id(text)})
    try:
        if action == "hold":
            location = _hold(guest_id, performance_id, chosen)
        else:
            location = _hold_best(guest_id, performance_id, request.form.get("count", ""))
    except Problem as problem:
        if problem.status not in {409, 422}:
            raise
        response = _seats_page(performance_id, problem, chosen)
        response.status_code = problem.status
        response.headers.extend(problem.headers)
        return response
    return redirect(location.removeprefix("/api"), 303)


@blueprint.get("/reservations")
def reservations() -> str:
    """List the guest's reservations, and those found by code in this browser."""
    return _reservations_page()


@blueprint.post("/reservations")
def find() -> AnyResponse:
    """Find a reservation by its code and let this browser see it from now on."""
    _guest_of_form()
    try:
        with service().pool.connection() as connection:
            address = request.remote_addr or ""
            found = str(codes.find(connection, request.form.get("code", ""), address))
    except Problem as problem:
        if problem.status not in {404, 429}:
            raise
        response = make_response(_reservations_page(problem), problem.status)
        response.headers.extend(problem.headers)
        return response
    others = [known for known in _found_by_code() if known != found]
    session["found"] = [found, *others][:FOUND_RESERVATIONS]
    return redirect(f"/reservations/{found}", 303)


@blueprint.get("/reservations/<reservation_id>")
def reservation(reservation_id: str) -> str:
    """Show a reservation with what can be done with it."""
    return _reservation_page(reservation_uuid(reservation_id))


@blueprint.post("/reservations/<reservation_id>")
def change(reservation_id: str) -> AnyResponse:
    """Confirm, extend or cancel."""
    _guest_of_form()
    action = request.form.get("action", "")
    changes: dict[str, _Change] = {
        "confirm": booking.confirm,
        "cancel": booking.cancel,
        "extend": partial(booking.extend, terms=service().terms),
    }
    if action not in changes:
        raise problems.malformed("Expected to confirm, to extend or to cancel.")
    wanted = reservation_uuid(reservation_id)
    with service().pool.connection() as connection:
        owner = _visible(connection, wanted).reservation.customer_id
    try:
        with counted(action), service().writing(owner) as connection:
            changes[action](connection, wanted, owner)
    except Problem as problem:
        if problem.status != 409:
            raise
        return make_response(_reservation_page(wanted, problem), 409)
    return redirect(f"/reservations/{reservation_id}", 303)


def sale_state(now: datetime, performance: _Window) -> str:
    """Return how a sale stands: cancelled, past, soon, closed or open."""
    if performance.status != "scheduled":
        return "cancelled"
    if performance.starts_at <= now:
        return "past"
    if now < performance.sales_open_at:
        return "soon"
    return "open" if now < performance.sales_close_at else "closed"


def _hold(guest_id: str, performance_id: int, seat_ids: list[int]) -> str:
    _check_count(len(seat_ids))
    key = _form_key(guest_id, "reserve-page", f"{performance_id} {seat_ids}")
    order = Order(guest_id, performance_id, seat_ids, confirm=False)
    with counted("hold"), service().writing(guest_id) as connection:
        return booking.book(connection, order, service().terms, key).location


def _hold_best(guest_id: str, performance_id: int, count: str) -> str:
    _check_count(int(count) if _is_id(count) else 0)
    key = _form_key(guest_id, "reserve-best-page", f"{performance_id} {count}")
    wanted = Wanted(guest_id, performance_id, int(count), confirm=False)
    with counted("hold"), service().writing(guest_id) as connection:
        return best_available.book(connection, wanted, service().terms, key).location


def _check_count(count: int) -> None:
    most = service().max_seats_per_request
    if not 1 <= count <= most:
        detail = language.translate("Please choose 1 to %(most)s seats.", most=most)
        raise Problem(422, "invalid-body", detail)


def _form_key(guest_id: str, operation: str, wanted: str) -> Key | None:
    key = request.form.get("key", "")
    if not key:
        return None
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise problems.malformed("This form was not made by this page; please load it again.")
    return Key(guest_id, operation, key, idempotency.fingerprint(wanted.encode()))


def _seats_page(
    performance_id: int, problem: Problem | None = None, chosen: list[int] | None = None
) -> Response:
    guest_id = _guest()
    with service().pool.connection() as connection:
        found = catalogue.read_performance(connection, performance_id)
        tag, seen = seat_map.look(connection, performance_id)
        wanted = {"customer_id": guest_id, "performance_id": performance_id}
        mine = {row[0] for row in connection.execute(sql.LIST_OWN_SEATS, wanted)}
    html = render_template(
        "performance.html",
        performance=found,
        state=sale_state(found.now, found),
        opens_in_s=(found.sales_open_at - found.now).total_seconds(),
        plan=hall.plan_of(seen.seats),
        tag=tag,
        mine=mine,
        chosen=frozenset(chosen or ()),
        problem=problem,
        most=service().max_seats_per_request,
        words=hall.words_of_script(),
        csrf=session["csrf"],
        key=secrets.token_urlsafe(16),
    )
    return make_response(html)


def _reservations_page(problem: Problem | None = None) -> str:
    guest_id = _guest()
    with service().pool.connection() as connection:
        own = booking.newest(connection, guest_id, PAGE_RESERVATIONS)
        known = {each.reservation_id for each in own}
        others = [UUID(each) for each in _found_by_code() if each not in known]
        found = [stored.reservation for stored in booking.read(connection, others)]
    return render_template(
        "reservations.html", reservations=own, found=found, problem=problem, csrf=session["csrf"]
    )


def _reservation_page(reservation_id: UUID, problem: Problem | None = None) -> str:
    with service().pool.connection() as connection:
        stored = _visible(connection, reservation_id)
        code = codes.of_reservation(connection, reservation_id)
    shown = stored.reservation
    left_s = (shown.expires_at - stored.now).total_seconds() if shown.expires_at else 0
    return render_template(
        "reservation.html",
        reservation=shown,
        code=code,
        left_s=left_s,
        performance_cancelled=stored.performance_status != "scheduled",
        can_extend=_gains_by_extending(stored),
        can_cancel=shown.status in {"held", "confirmed"}
        and shown.performance.starts_at > stored.now,
        problem=problem,
        csrf=session["csrf"],
    )


def _gains_by_extending(stored: Stored) -> bool:
    shown, terms = stored.reservation, service().terms
    last = min(shown.created_at + terms.hold_max, stored.sale_ends_at)
    return shown.expires_at is not None and shown.expires_at < last


def _visible(connection: Connection, reservation_id: UUID) -> Stored:
    """Return a reservation that this browser may see: the guest's own, or found by its code.

    Raises:
        Problem: 404.
    """
    guest_id = session.get("guest_id", "")
    for stored in booking.read(connection, [reservation_id]):
        shown = stored.reservation
        if shown.customer_id == guest_id or shown.reservation_id in _found_by_code():
            return stored
    raise problems.not_found("reservation")


def _found_by_code() -> list[str]:
    found: list[str] = session.get("found", [])
    return found


def _place_of(text: str, now: datetime) -> Place:
    """Read where the page before ended; whatever is none of these is the beginning."""
    found = PLACE.fullmatch(text)
    if not found:
        return Place(now, 0)
    return Place(EPOCH + timedelta(microseconds=int(found[1])), int(found[2]))


def _place_text(last: ConcertAnswer, now: datetime) -> str:
    begins_at = min(one.starts_at for one in last.performances if one.starts_at > now)
    return f"{(begins_at - EPOCH) // timedelta(microseconds=1)}-{last.concert_id}"


def _now(connection: Connection) -> datetime:
    row = connection.execute(sql.READ_CLOCK).fetchone()
    assert row  # noqa: S101 - a statement without FROM has one row
    now: datetime = row[0]
    return now


def _guest() -> str:
    if not CUSTOMER_ID.fullmatch(session.get("guest_id", "")) or "csrf" not in session:
        session.permanent = True
        session["guest_id"] = f"guest-{secrets.token_hex(12)}"
        session["csrf"] = secrets.token_urlsafe(24)
    return str(session["guest_id"])


def _guest_of_form() -> str:
    expected, given = session.get("csrf", ""), request.form.get("csrf", "")
    if not expected or not hmac.compare_digest(expected.encode(), given.encode()):
        raise Problem(403, "forbidden", "This form is no longer valid. Please open the page again.")
    return str(session["guest_id"])


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= len(text) <= 19 and 1 <= int(text) <= ID_MAX
