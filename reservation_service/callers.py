"""Who calls: a customer by JWT or by the page's signed cookie, or the admin by his token.

Tokens are HS256 by the service's secret; with a key set (jwks.py) RS256 and ES256 too. Each
algorithm has keys of its own: a token can't choose which key is used with which algorithm.
"""

import hmac
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import jwt
from flask import Request

from reservation_service.jwks import ALGORITHMS, KeySet
from reservation_service.problems import Problem, unauthenticated

AUDIENCE = "reservation-service"
CUSTOMER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Of a worker; of 8 kB at most each, for that is how long a header may be.
TOKENS_KEPT = 2_048
BEARER = re.compile(r"bearer +(.+)", re.IGNORECASE | re.ASCII)


class Secrets(NamedTuple):
    """What callers are checked against; without an admin token there is no admin.

    `secret_keys` are the present one and the one before, if its tokens still count.
    """

    secret_keys: tuple[str, ...]
    admin_token: str | None
    keys: KeySet | None = None


class Read(NamedTuple):
    """What a valid token says; `expires_at` in seconds since 1970."""

    customer_id: str
    expires_at: float


def make_token(customer_id: str, secret_key: str, ttl_s: int) -> str:
    """Sign a token that lets its bearer act as this customer for `ttl_s` seconds.

    Raises:
        ValueError: no valid customer id.
    """
    if not CUSTOMER_ID.fullmatch(customer_id):
        raise ValueError("expected 1 to 64 of A-Z a-z 0-9 . _ -")
    claims = {"aud": AUDIENCE, "sub": customer_id, "exp": int(time.time()) + ttl_s}
    return jwt.encode(claims, secret_key, algorithm="HS256")


def require_customer(request: Request, cookie: Mapping[str, str], secrets: Secrets) -> str:
    """Return the calling customer's id. A header, where there is one, decides alone.

    Raises:
        Problem: 401 nobody, or an invalid token; 403 the admin, who is no customer, or a write
            that another site sent with the cookie.
    """
    if "Authorization" in request.headers:
        token = _bearer(request)
        if _is_admin(token, secrets):
            raise Problem(403, "forbidden", "The admin is no customer.")
        return _customer_of(token, secrets)
    guest_id = cookie.get("guest_id", "")
    if not CUSTOMER_ID.fullmatch(guest_id):
        raise unauthenticated("This needs a token: Authorization: Bearer …")
    if request.method not in {"GET", "HEAD"} and not _same_origin(request):
        raise Problem(403, "forbidden", "The cookie counts only on the service's own pages.")
    return guest_id


def require_admin(request: Request, cookie: Mapping[str, str], secrets: Secrets) -> None:
    """Let only the admin pass.

    Raises:
        Problem: 401 nobody, or an invalid token; 403 a customer.
    """
    if "Authorization" in request.headers:
        token = _bearer(request)
        if _is_admin(token, secrets):
            return
        _customer_of(token, secrets)
    elif "guest_id" not in cookie:
        raise unauthenticated("This needs the admin's token: Authorization: Bearer …")
    raise Problem(403, "forbidden", "Only the admin may do this.")


def _bearer(request: Request) -> str:
    match = BEARER.fullmatch(request.headers["Authorization"].strip())
    if not match:
        raise unauthenticated("Expected Authorization: Bearer <token>.")
    return match[1]


def _is_admin(token: str, secrets: Secrets) -> bool:
    expected = secrets.admin_token
    return expected is not None and hmac.compare_digest(token.encode(), expected.encode())


def _customer_of(token: str, secrets: Secrets) -> str:
    try:
        read = _read_own(token, secrets.secret_keys) or _read_foreign(token, secrets.keys)
    except (jwt.PyJWTError, ValueError):
        # Which check failed is of use only to somebody who forges.
        raise unauthenticated("The token is not valid.") from None
    if read.expires_at <= time.time():  # since it was read
        raise unauthenticated("The token is not valid.")
    return read.customer_id


@lru_cache(TOKENS_KEPT)
def _read_own(token: str, secret_keys: tuple[str, ...]) -> Read | None:
    """Read a token of our secret; None: it says that it is signed otherwise.

    Kept, because reading it takes as long as the rest of a booking outside the database. A bad one
    isn't: it is an error. Nor is what a key set has signed: its keys change.

    Raises:
        jwt.PyJWTError, ValueError: it isn't valid.
    """
    if jwt.get_unverified_header(token).get("alg") != "HS256":
        return None
    for secret_key in secret_keys[:-1]:
        with suppress(jwt.InvalidSignatureError):
            return _read(token, "HS256", secret_key)
    return _read(token, "HS256", secret_keys[-1])


def _read_foreign(token: str, keys: KeySet | None) -> Read:
    """Read a token of the key set. Algorithm and key belong together; it only says which pair.

    Raises:
        jwt.PyJWTError, ValueError: it isn't valid, or there is no such pair.
    """
    header = jwt.get_unverified_header(token)
    algorithm: str = header.get("alg", "")
    key = keys and algorithm in ALGORITHMS.values() and keys.find(header.get("kid"), algorithm)
    if not key:
        raise jwt.InvalidTokenError
    return _read(token, algorithm, key)


def _read(token: str, algorithm: str, key: str | jwt.PyJWK) -> Read:
    claims = jwt.decode(
        token,
        key,
        algorithms=[algorithm],
        audience=AUDIENCE,
        options={"require": ["exp", "sub", "aud"], "enforce_minimum_key_length": True},
    )
    customer_id, expires_at = claims["sub"], claims["exp"]
    # PyJWT takes a text for a number.
    if type(expires_at) not in {int, float} or not CUSTOMER_ID.fullmatch(customer_id):
        raise jwt.InvalidTokenError
    return Read(str(customer_id), expires_at)


def _same_origin(request: Request) -> bool:
    origin = request.headers.get("Origin")
    return origin is None or origin.partition("://")[2] == request.host
