"""The booking page: plain HTML forms over the same transactions as the API; works without script.

A guest is known by a signed cookie, made when the first form is shown. Each form carries a token
that is bound to this cookie (no other site knows it) and an Idempotency-Key of its own, so that
a double click or a reload books once.
"""

import hmac
import secrets
from collections.abc import Sequence
from itertools import groupby
from zoneinfo import ZoneInfo

from flask import Blueprint, Response, make_response, redirect, render_template, request, session
from werkzeug import Response as AnyResponse

from reservation_service import booking, catalogue, idempotency, problems
from reservation_service.api import ID_MAX, IDEMPOTENCY_KEY, counted, reservation_uuid, service
from reservation_service.booking import Order
from reservation_service.callers import CUSTOMER_ID
from reservation_service.catalogue import SeatAnswer
from reservation_service.idempotency import Key
from reservation_service.problems import Problem

PAGE_CONCERTS = 100
PAGE_RESERVATIONS = 50

Section = tuple[str, list[SeatAnswer], int, list[tuple[str, list[SeatAnswer]]]]

blueprint = Blueprint("pages", __name__)


@blueprint.get("/")
def concerts() -> str:
    """List concerts."""
    with service().pool.connection() as connection:
        found = catalogue.read_concerts(connection, PAGE_CONCERTS)
    return render_template("concerts.html", concerts=found)


@blueprint.get(f"/performances/<int(max={ID_MAX}):performance_id>")
def performance(performance_id: int) -> Response:
    """Show the seats of a performance as a form."""
    return _seats_page(performance_id)


@blueprint.post(f"/performances/<int(max={ID_MAX}):performance_id>")
def book(performance_id: int) -> AnyResponse:
    """Hold or book the chosen seats."""
    guest_id = _guest_of_form()
    seat_ids = sorted({int(text) for text in request.form.getlist("seat_ids") if _is_id(text)})
    action = request.form.get("action", "")
    if action not in {"hold", "book"}:
        raise problems.malformed("Expected to hold or to book.")
    confirm = action == "book"
    try:
        answer_location = _book(guest_id, performance_id, seat_ids, confirm=confirm)
    except Problem as problem:
        if problem.status not in {409, 422}:
            raise
        response = _seats_page(performance_id, problem.detail, seat_ids)
        response.status_code = problem.status
        return response
    return redirect(answer_location, 303)


@blueprint.get("/reservations")
def reservations() -> str:
    """List the guest's reservations."""
    guest_id = session.get("guest_id")
    found = []
    if guest_id:
        with service().pool.connection() as connection:
            found = booking.newest(connection, guest_id, PAGE_RESERVATIONS)
    return render_template("reservations.html", reservations=found)


@blueprint.get("/reservations/<reservation_id>")
def reservation(reservation_id: str) -> str:
    """Show a reservation with what can be done with it."""
    return _reservation_page(reservation_id)


@blueprint.post("/reservations/<reservation_id>")
def change(reservation_id: str) -> AnyResponse:
    """Confirm or cancel."""
    guest_id = _guest_of_form()
    action = request.form.get("action", "")
    changes = {"confirm": booking.confirm, "cancel": booking.cancel}
    if action not in changes:
        raise problems.malformed("Expected to confirm or to cancel.")
    act = changes[action]
    try:
        with counted(action), service().writing(guest_id) as connection:
            act(connection, reservation_uuid(reservation_id), guest_id)
    except Problem as problem:
        if problem.status != 409:
            raise
        return make_response(_reservation_page(reservation_id, problem.detail), 409)
    return redirect(f"/reservations/{reservation_id}", 303)


def money(amount: int, currency: str) -> str:
    """Write minor units as a price, for the currencies with two decimals and those with none."""
    if currency in {"JPY", "KRW", "VND", "CLP", "ISK", "XAF", "XOF"}:
        return f"{amount:,} {currency}"
    return f"{amount // 100:,}.{amount % 100:02} {currency}"


def local_time(value: object, time_zone: str) -> str:
    """Write a time as the concert's city has it."""
    return f"{value.astimezone(ZoneInfo(time_zone)):%a %d %B %Y, %H:%M}"  # type: ignore[attr-defined]


def _book(guest_id: str, performance_id: int, seat_ids: list[int], *, confirm: bool) -> str:
    most = service().max_seats_per_request
    if not 1 <= len(seat_ids) <= most:
        raise Problem(422, "invalid-body", f"Please choose 1 to {most} seats.")
    wanted = f"{performance_id} {seat_ids} {confirm}".encode()
    form_key = request.form.get("key", "")
    if form_key and not IDEMPOTENCY_KEY.fullmatch(form_key):
        raise problems.malformed("This form was not made by this page; please load it again.")
    key = Key(guest_id, "reserve-page", form_key, idempotency.fingerprint(wanted))
    order = Order(guest_id, performance_id, seat_ids, confirm)
    with (
        counted("book" if confirm else "hold"),
        service().writing(guest_id) as connection,
    ):
        answer = booking.book(connection, order, service().terms, key if form_key else None)
    return answer.location.removeprefix("/api")


def _seats_page(performance_id: int, message: str = "", chosen: Sequence[int] = ()) -> Response:
    _guest()
    with service().pool.connection() as connection:
        found = catalogue.read_performance(connection, performance_id)
        seats = catalogue.read_seats(connection, performance_id).seats
    html = render_template(
        "performance.html",
        performance=found,
        sections=_sections(seats),
        message=message,
        chosen=set(chosen),
        most=service().max_seats_per_request,
        csrf=session["csrf"],
        key=secrets.token_urlsafe(16),
    )
    return make_response(html)


def _sections(seats: list[SeatAnswer]) -> list[Section]:
    """Group into (section, all its seats, how many are available, rows of seats)."""
    result = []
    for section, group in groupby(seats, key=lambda seat: seat.section):
        of_section = list(group)
        rows = [(row, list(of_row)) for row, of_row in groupby(of_section, key=lambda s: s.row)]
        available = sum(seat.status == "available" for seat in of_section)
        result.append((section, of_section, available, rows))
    return result


def _reservation_page(reservation_id: str, message: str = "") -> str:
    guest_id = session.get("guest_id", "")
    with service().pool.connection() as connection:
        found = booking.find(connection, reservation_uuid(reservation_id), guest_id)
    return render_template(
        "reservation.html", reservation=found, message=message, csrf=session.get("csrf", "")
    )


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
    return text.isascii() and text.isdigit() and 1 <= len(text) <= 19 and int(text) <= ID_MAX
