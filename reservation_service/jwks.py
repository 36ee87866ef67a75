"""Public keys of an identity provider: a JSON Web Key Set, from a file or by HTTP.

Guarantees:
- A key is good for one algorithm, the one of its kind: RS256 for RSA, ES256 for P-256. Whatever
  the token claims, an RSA key never verifies an HMAC.
- Rotation: a token with an unknown key id asks for the set again, at most every `retry_s`; keys
  that were taken out of the set are forgotten within `fresh_s`.
- A provider that is away costs one request at a time `FETCH_TIMEOUT_S`; meanwhile the last known
  keys go on.
"""

import threading
import time
from pathlib import Path
from typing import Any

import jwt
import structlog

FETCH_TIMEOUT_S = 2.0
FILE_FRESH_S, FILE_RETRY_S = 5.0, 1.0
URL_FRESH_S, URL_RETRY_S = 300.0, 10.0
FILE_MAX_BYTES = 262_144
ALGORITHMS = {"RSA": "RS256", "EC": "ES256"}

Keys = dict[tuple[str | None, str], jwt.PyJWK]

log = structlog.get_logger(__name__)


class KeySet:
    """The keys by (key id, algorithm); safe to share between threads."""

    def __init__(self, source: Path | str) -> None:
        """Take a file's path, or a URL; nothing is read yet."""
        self._source = source
        is_file = isinstance(source, Path)
        self._fresh_s = FILE_FRESH_S if is_file else URL_FRESH_S
        self._retry_s = FILE_RETRY_S if is_file else URL_RETRY_S
        self._keys: Keys = {}
        self._read_at_s = self._asked_at_s = float("-inf")
        self._asking = threading.Lock()

    def find(self, key_id: str | None, algorithm: str) -> jwt.PyJWK | None:
        """Return the key that verifies such a token, or None."""
        if time.monotonic() - self._read_at_s >= self._fresh_s:
            self._refresh()
        found = self._found(key_id, algorithm)
        if found is None:
            self._refresh()
            found = self._found(key_id, algorithm)
        return found

    def _found(self, key_id: str | None, algorithm: str) -> jwt.PyJWK | None:
        if key_id is not None:
            return self._keys.get((key_id, algorithm))
        of_algorithm = [key for (_, name), key in self._keys.items() if name == algorithm]
        return of_algorithm[0] if len(of_algorithm) == 1 else None

    def _refresh(self) -> None:
        # Who finds another one asking goes on with the keys there are, unless there are none.
        if not self._asking.acquire(timeout=0 if self._keys else FETCH_TIMEOUT_S):
            return
        try:
            now_s = time.monotonic()
            if now_s - self._asked_at_s < self._retry_s:
                return
            self._asked_at_s = now_s
            self._keys = read(self._source)
            self._read_at_s = now_s
        except (jwt.PyJWTError, OSError, ValueError) as error:
            log.warning("the key set can't be read; the last known keys go on",
                        error=type(error).__name__)  # fmt: skip
        finally:
            self._asking.release()


def read(source: Path | str) -> Keys:
    """Read a key set.

    Raises:
        jwt.PyJWTError: it can't be fetched, or holds no key that verifies.
        OSError: the file can't be read.
        ValueError: it is no JSON.
    """
    if isinstance(source, Path):
        with source.open(encoding="utf-8") as file:
            key_set = jwt.PyJWKSet.from_json(file.read(FILE_MAX_BYTES))
    else:
        client = jwt.PyJWKClient(source, cache_jwk_set=False, timeout=FETCH_TIMEOUT_S)
        key_set = client.get_jwk_set()
    keys = {(key.key_id, algorithm): key for key in key_set.keys if (algorithm := _algorithm(key))}
    if not keys:
        raise jwt.PyJWKSetError("no RSA or P-256 key for signatures")
    return keys


def _algorithm(key: Any) -> str | None:
    """Return the algorithm that this key is for, or None if it is none of ours."""
    algorithm = ALGORITHMS.get(key.key_type)
    signs = key.public_key_use in {"sig", None}
    return algorithm if signs and key.algorithm_name == algorithm else None
