"""Reservation codes: ten characters by which a guest finds a reservation again on another device.

Guarantees:
- A code is random, 50 bits, and says nothing of the reservation; nothing else (an id in an event or
  a URL) leads to it.
- It is made when its reservation is first shown to its guest, and then stays.
- Whoever tries codes gets few attempts a minute, and the same answer for every wrong one.

The alphabet is Crockford's Base32, without I, L, O and U: what is misread for 1 or 0 counts as
that.
"""

import secrets
from ipaddress import IPv6Address, ip_address, ip_network
from uuid import UUID

from reservation_service import problems, sql
from reservation_service.database import Connection
from reservation_service.problems import Problem

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
LENGTH = 10
ATTEMPTS_PER_MINUTE = 20

_MISREAD = str.maketrans("OIL", "011", " -\u2010\u2011\u2013\u00a0")


def of_reservation(connection: Connection, reservation_id: UUID) -> str:
    """Return the reservation's code, as people see it: XXXXX-XXXXX."""
    drawn = "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))
    wanted = {"reservation_id": reservation_id, "code": drawn}
    with connection.pipeline():
        connection.execute(sql.KEEP_CODE, wanted)
        found = connection.execute(sql.READ_CODE, wanted)
    row = found.fetchone()
    assert row  # noqa: S101 - the conflict has waited for it
    code = row[0]
    return f"{code[:5]}-{code[5:]}"


def find(connection: Connection, text: str, address: str) -> UUID:
    """Return the id of the reservation with this code, as somebody at `address` typed it.

    Raises:
        Problem: 404 there is none; 429 too many attempts from this address.
    """
    _count_attempt(connection, address)
    code = normal(text)
    row = connection.execute(sql.FIND_CODE, {"code": code}).fetchone() if code else None
    if row is None:
        raise Problem(404, "not-found", "There is no reservation with this code.")
    found: UUID = row[0]
    return found


def normal(text: str) -> str | None:
    """Return the code that somebody meant; None if it can't be one."""
    code = text[:100].upper().translate(_MISREAD)
    return code if len(code) == LENGTH and set(code) <= set(ALPHABET) else None


def _count_attempt(connection: Connection, address: str) -> None:
    counted = connection.execute(sql.COUNT_WRITE, {"customer_id": f"code {_network(address)}"})
    attempts, rest_s = counted.fetchone() or (0, 0)
    if attempts > ATTEMPTS_PER_MINUTE:
        problem = problems.too_many_writes(ATTEMPTS_PER_MINUTE, max(1, rest_s))
        problem.detail = "Too many attempts. Please wait a minute."
        raise problem


def _network(address: str) -> str:
    """Return whose attempts count together: one has a whole /64 of IPv6 addresses to himself."""
    try:
        known = ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(known, IPv6Address):
        return str(ip_network((int(known), 64), strict=False))
    return str(known)
