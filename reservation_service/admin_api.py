"""What the admin may change over HTTP: concerts, sales times, seats that aren't for sale.

Each call answers with what has taken effect; repeated, it changes nothing and answers the same.
"""

import time
from typing import Annotated

import msgspec
from flask import Blueprint, Response, request, session
from pydantic import BaseModel, ConfigDict, Field, field_validator

from reservation_service import callers, cancellation, catalogue_changes
from reservation_service.api import ID_MAX, body_of, json_answer, service, traceparent
from reservation_service.new_concert import ConcertChange, PerformanceChange

MAX_SEATS_PER_CALL = 5_000
# A request doesn't wait for the cancellation of a whole hall: the sweeper goes on with it.
CANCEL_WITHIN_S = 2.0

blueprint = Blueprint("admin", __name__, url_prefix="/api")


class SeatsToChange(BaseModel):
    """Body of `block-seats` and `release-seats`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    seat_ids: list[Annotated[int, Field(ge=1, le=ID_MAX)]] = Field(
        min_length=1, max_length=MAX_SEATS_PER_CALL, json_schema_extra={"uniqueItems": True}
    )

    @field_validator("seat_ids")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seat is named twice")
        return value


class CancelledPerformance(msgspec.Struct, frozen=True):
    """A performance that is cancelled.

    `cancelled_reservations` were cancelled by this call; with `finished` none is left, else
    `expire-holds` goes on with them.
    """

    performance_id: int
    cancelled_reservations: int
    finished: bool
    status: str = "cancelled"


@blueprint.before_request
def only_the_admin() -> None:
    """Let nobody else in."""
    callers.require_admin(request, session, service().secrets)


@blueprint.patch(f"/concerts/<int(max={ID_MAX}):concert_id>")
def change_concert(concert_id: int) -> Response:
    """Give a concert another title or venue (admin)."""
    change = body_of(ConcertChange)
    with service().pool.connection() as connection:
        changed = catalogue_changes.change_concert(connection, concert_id, change, traceparent())
    return json_answer(changed)


@blueprint.patch(f"/performances/<int(max={ID_MAX}):performance_id>")
def change_performance(performance_id: int) -> Response:
    """Give a performance another begin or other sales times (admin)."""
    change = body_of(PerformanceChange)
    with service().pool.connection() as connection:
        changed = catalogue_changes.change_performance(
            connection, performance_id, change, traceparent()
        )
    return json_answer(changed)


@blueprint.post(f"/performances/<int(max={ID_MAX}):performance_id>/block-seats")
def block_seats(performance_id: int) -> Response:
    """Take seats from the sale, all or none (admin)."""
    seat_ids = body_of(SeatsToChange).seat_ids
    with service().pool.connection() as connection:
        return json_answer(
            catalogue_changes.block(connection, performance_id, seat_ids, traceparent())
        )


@blueprint.post(f"/performances/<int(max={ID_MAX}):performance_id>/release-seats")
def release_seats(performance_id: int) -> Response:
    """Give blocked seats back to the sale, all or none (admin)."""
    seat_ids = body_of(SeatsToChange).seat_ids
    with service().pool.connection() as connection:
        return json_answer(
            catalogue_changes.release(connection, performance_id, seat_ids, traceparent())
        )


@blueprint.post(f"/performances/<int(max={ID_MAX}):performance_id>/cancel")
def cancel_performance(performance_id: int) -> Response:
    """Cancel a performance, and its reservations as far as time allows (admin)."""
    until_s = time.monotonic() + CANCEL_WITHIN_S
    with service().pool.connection() as connection:
        done = cancellation.cancel(
            connection, performance_id, traceparent(), lambda: time.monotonic() > until_s
        )
    answer = json_answer(CancelledPerformance(performance_id, done.cancelled, done.finished))
    answer.status_code = 200 if done.finished else 202
    return answer
