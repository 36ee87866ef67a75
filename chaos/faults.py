"""Strikes at random and mends what it broke: every fault ends in time, so the system must recover.

The order of strikes and their lengths come from a seed; what they hit is decided by the machine.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

TICK_S = 0.1

# Strikes with chances from the given source; returns when to mend it (seconds) and how, or None
# when it could not strike now.
Strike = Callable[[random.Random], "tuple[float, Callable[[], None]] | None"]


@dataclass(frozen=True)
class Fault:
    """One way to break something; those with more weight come more often."""

    name: str
    weight: int
    strike: Strike


@dataclass
class Faults:
    """Strikes every `pause_s` (from, to) seconds with one of `kinds`."""

    kinds: Sequence[Fault]
    seed: int
    pause_s: tuple[float, float]
    struck: Counter[str] = field(default_factory=Counter)
    _mending: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def run(self, until: Callable[[], bool]) -> None:
        """Strike until told that it is enough; everything is mended behind it."""
        chance, wait = random.Random(self.seed), threading.Event()  # noqa: S311
        next_at = time.monotonic() + chance.uniform(*self.pause_s)
        try:
            while not until():
                wait.wait(TICK_S)
                self._mend(time.monotonic())
                if time.monotonic() >= next_at:
                    self._strike(chance)
                    next_at = time.monotonic() + chance.uniform(*self.pause_s)
        finally:
            self._mend(float("inf"))

    def _strike(self, chance: random.Random) -> None:
        (kind,) = chance.choices(self.kinds, [kind.weight for kind in self.kinds])
        damage = kind.strike(chance)
        if damage is not None:
            after_s, mend = damage
            self.struck[kind.name] += 1
            self._mending.append((time.monotonic() + after_s, mend))

    def _mend(self, now: float) -> None:
        due = [(at, mend) for at, mend in self._mending if at <= now]
        self._mending = [(at, mend) for at, mend in self._mending if at > now]
        for _, mend in due:
            mend()
