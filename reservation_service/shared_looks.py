"""Looks that many want at once: those who come during one share the next.

Guarantees:
- Nobody is given a look that began before he asked: he may have changed what is seen.
- At most one look at a thing is under way, and at most one waits for it to end.
- Nobody waits for another's look longer than `TIMEOUT_S`.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

# As long as anybody waits for a connection.
TIMEOUT_S = 5.0

Seen = TypeVar("Seen")


class SharedLooks:
    """Looks at things by their names; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[Hashable, Future[Any]] = {}
        self._next: dict[Hashable, Future[Any]] = {}

    def share(self, what: Hashable, look: Callable[[], Seen]) -> Seen:
        """Return what `look` returns, when called here or by another after this call began.

        Raises:
            TimeoutError: the look before, or the one to share, isn't over after `TIMEOUT_S`.
            Exception: what `look` raised.
        """
        ours: Future[Seen] = Future()
        with self._lock:
            before, shared = self._under_way.get(what), self._next.get(what)
            if shared is None:
                (self._under_way if before is None else self._next)[what] = ours
        if shared is not None:
            return shared.result(TIMEOUT_S)  # type: ignore[no-any-return]
        try:
            if before is not None:
                self._follow(what, before, ours)
            ours.set_result(look())
        except BaseException as error:
            ours.set_exception(error)
            raise
        finally:
            self._end(what, ours)
        return ours.result()

    def _follow(self, what: Hashable, before: "Future[Any]", ours: "Future[Any]") -> None:
        """Wait for the look before ours, however it ends; who comes from now on shares no more."""
        before.exception(TIMEOUT_S)
        with self._lock:
            self._under_way[what] = ours
            del self._next[what]

    def _end(self, what: Hashable, ours: "Future[Any]") -> None:
        with self._lock:
            for looks in (self._under_way, self._next):
                if looks.get(what) is ours:
                    del looks[what]
