"""Breadth-first search through every state that a model can come to.

A state is an immutable, hashable value. Nothing is sampled and nothing is left out: each state is
visited once, and the first one that is broken was reached by a shortest way.
"""

import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

State = TypeVar("State", bound=Hashable)


class Model(Protocol[State]):
    """What may happen, and what must never be."""

    def initial(self) -> State:
        """Return the state in which nothing has happened."""
        ...

    def steps(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield what may happen next, in words, and the state behind it."""
        ...

    def broken(self, state: State) -> str | None:
        """Return the promise that this state breaks ("lost: ..."), or None."""
        ...

    def done(self, state: State) -> bool:
        """Whether all work was done here: a model that never comes to this shows nothing."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a search has found; without `broken` the model holds in all of `states`."""

    states: int
    cpu_s: float
    done: int = 0
    broken: str | None = None
    trace: tuple[str, ...] = ()


def explore(model: Model[State]) -> Outcome:
    """Visit every state, or stop at the first that is broken."""
    begun_s = time.process_time()
    first = model.initial()
    # Each with the one it was reached from: enough to find the way again.
    seen: dict[State, State | None] = {first: None}
    todo, done = deque([first]), 0
    while todo:
        state = todo.popleft()
        done += model.done(state)
        if broken := model.broken(state):
            cpu_s = time.process_time() - begun_s
            return Outcome(len(seen), cpu_s, done, broken, _way_to(model, state, seen))
        for _, following in model.steps(state):
            if following not in seen:
                seen[following] = state
                todo.append(following)
    return Outcome(len(seen), time.process_time() - begun_s, done)


def _way_to(model: Model[State], end: State, seen: dict[State, State | None]) -> tuple[str, ...]:
    """Return in words how a state was reached."""
    words: list[str] = []
    state = end
    while (before := seen[state]) is not None:
        words.append(next(word for word, after in model.steps(before) if after == state))
        state = before
    return tuple(reversed(words))
