"""What a caller did that can't be done, or what failed: RFC 9457 problems.

`type` is a bare word, which RFC 9457 allows as a relative reference: `customer-limit`.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec
from pydantic import ValidationError

SEATS_UNAVAILABLE = "seats-unavailable"


class Kind(NamedTuple):
    """A kind of problem: its HTTP status, and what it means to the caller."""

    status: int
    meaning: str


# These words never change; a new kind gets a new one.
KINDS = {
    "malformed-request": Kind(
        400, "It can't be read: no JSON, or a limit, cursor or Idempotency-Key of the wrong form."
    ),
    "unauthenticated": Kind(401, "No caller, or one whose token or cookie is not valid."),
    "forbidden": Kind(403, "The caller is known and may not do this."),
    "not-found": Kind(404, "There is no such thing, or it is somebody else's."),
    "method-not-allowed": Kind(405, "The path knows other methods: see Allow."),
    SEATS_UNAVAILABLE: Kind(
        409, "Seats are taken, blocked or of another performance; nothing was reserved."
    ),
    "not-on-sale": Kind(409, "The performance is cancelled, past or outside its sales window."),
    "customer-limit": Kind(
        409, "The customer would have more seats of the performance than one may."
    ),
    "wrong-state": Kind(409, "The reservation's state, given as `status`, forbids the call."),
    "request-in-flight": Kind(
        409, "The first request with this Idempotency-Key is not answered yet: see Retry-After."
    ),
    "too-large": Kind(413, "The body is larger than the call takes."),
    "invalid-body": Kind(422, "The body doesn't match the schema; `errors` says where."),
    "event-too-large": Kind(422, "The concert's event would be larger than its topic takes."),
    "key-reused": Kind(422, "This Idempotency-Key was used with another body."),
    "too-many-writes": Kind(
        429, "The customer's writes of this minute are used up: see Retry-After."
    ),
    "internal-error": Kind(500, "A fault of the service."),
    "unavailable": Kind(
        503, "The database is away, or too many want the same at once: see Retry-After."
    ),
    "http-error": Kind(400, "Whatever else the web server refuses; `status` tells it apart."),
}

STATES = ["held", "confirmed", "cancelled", "expired"]
SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457. With `wrong-state`, `status` is the reservation's state.",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"enum": list(KINDS)},
        "title": {"type": "string"},
        "status": {"anyOf": [{"type": "integer"}, {"enum": STATES}]},
        "detail": {"type": "string", "description": "One sentence for a person."},
        "unavailable_seats": {"type": "array", "items": {"type": "integer"}},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["location", "message"],
                "properties": {"location": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


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
        assert type_ in KINDS, type_  # noqa: S101 - the words are a promise
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
        SEATS_UNAVAILABLE,
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


def told_by(error: ValidationError) -> list[dict[str, str]]:
    """Return what pydantic found, without what was sent: the first 50 members and what's wrong."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return [
        {
            "location": ".".join(map(str, each["loc"])),
            "message": each["msg"].removeprefix("Value error, "),
        }
        for each in found[:50]
    ]


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
