"""What a caller did that can't be done, or what failed: RFC 9457 problems.

`type` is a bare word, which RFC 9457 allows as a relative reference: `customer-limit`.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec


class Problem(Exception):  # noqa: N818 - RFC 9457's word for it
    """A refusal with its HTTP status; raised anywhere below a request, answered at the edge.

    Args:
        status: HTTP status code.
        type_: short word naming the kind of problem; never changes.
        detail: one sentence for a person.
        headers: further headers of the answer.
        members: further members of the answer, like `unavailable_seats`.
    """

    def __init__(
        self,
        status: int,
        type_: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.type = type_
        self.detail = detail
        self.headers = dict(headers or {})
        self.members = dict(members or {})

    def body(self) -> bytes:
        """Return the answer's JSON.

        A problem that names the state of a reservation in `status`, as the API promises, gives
        the HTTP status to the status line alone.
        """
        return msgspec.json.encode(
            {
                "type": self.type,
                "title": HTTPStatus(self.status).phrase,
                "status": self.status,
                "detail": self.detail,
                **self.members,
            }
        )


def not_found(what: str) -> Problem:
    """Nothing there, or nothing the caller may know of."""
    return Problem(404, "not-found", f"There is no such {what}.")


def seats_unavailable(
    seat_ids: Iterable[int],
    detail: str = "Some of these seats are no longer available; nothing was reserved.",
) -> Problem:
    """Somebody else has these seats, or they aren't for sale in this performance."""
    return Problem(
        409,
        "seats-unavailable",
        detail,
        members={"unavailable_seats": sorted(seat_ids)},
    )


def not_on_sale(detail: str) -> Problem:
    """The performance is closed, past or cancelled."""
    return Problem(409, "not-on-sale", detail)


def state_forbids(status: str, action: str) -> Problem:
    """The reservation's state doesn't allow the change."""
    return Problem(
        409,
        "wrong-state",
        f"The reservation is {status}; {action} is not possible.",
        members={"status": status},
    )


def invalid(errors: list[dict[str, str]]) -> Problem:
    """The body is JSON, but not what the schema asks for."""
    return Problem(
        422, "invalid-body", "The body does not match the schema.", members={"errors": errors}
    )


def event_too_large(detail: str) -> Problem:
    """The concert's event is larger than its topic takes, so nobody could be told of it."""
    return Problem(422, "event-too-large", detail, members={"errors": []})


def malformed(detail: str) -> Problem:
    """The request can't be read."""
    return Problem(400, "malformed-request", detail)


def unavailable(detail: str, retry_after_s: int = 1) -> Problem:
    """Not the caller's fault and not for long."""
    return Problem(503, "unavailable", detail, headers={"Retry-After": str(retry_after_s)})


def too_many_writes(most: int, retry_after_s: int) -> Problem:
    """The customer has had what RESERVATION_WRITES_PER_MINUTE allows."""
    return Problem(
        429,
        "too-many-writes",
        f"At most {most} writes a minute; please wait.",
        headers={"Retry-After": str(retry_after_s)},
    )


def unauthenticated(detail: str) -> Problem:
    """Nobody, or nobody we know."""
    return Problem(401, "unauthenticated", detail, headers={"WWW-Authenticate": "Bearer"})
