"""Which fault comes when: decided by the seed alone, before the first one strikes.

Rounds of one fault, or of two at once of different areas. Kinds are dealt like cards: each comes
once before one comes again, so that a run of some minutes has seen them all.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WARM_UP_S = 5.0
# Enough for most to recover before the next one, and not always.
PAUSE_S = (2.0, 7.0)
TWO_AT_ONCE = 0.3
# The second of two comes within the first one.
LATER_S = (0.3, 2.0)


@dataclass(frozen=True)
class Planned:
    """A fault to come: `kind` from `starts_s` to `ends_s` behind the beginning.

    `chance` seeds what it decides for itself, like its target.
    """

    number: int
    kind: str
    starts_s: float
    ends_s: float
    chance: str


@dataclass(frozen=True)
class Nature:
    """What a schedule needs to know of a kind: seconds it lasts, and what it is about."""

    lasts_s: tuple[float, float]
    area: str


def plan(natures: Mapping[str, Nature], *, duration_s: float, seed: int) -> list[Planned]:
    """Return the faults of a run, by their beginning."""
    chance = random.Random(f"schedule {seed}")  # noqa: S311 - no secret
    deck: list[str] = []
    faults: list[Planned] = []

    def add(kind: str, at_s: float) -> float:
        until_s = at_s + chance.uniform(*natures[kind].lasts_s)
        number = len(faults) + 1
        faults.append(
            Planned(number, kind, round(at_s, 2), round(until_s, 2), f"{seed} {number} {kind}")
        )
        return until_s

    at_s = WARM_UP_S
    while at_s < duration_s:
        if len({natures[kind].area for kind in deck}) < 2:
            deck += _shuffled(natures, chance)
        first = deck.pop(0)
        ends_s = add(first, at_s)
        if chance.random() < TWO_AT_ONCE:
            # Every kind has its turn: who may not come now comes next.
            second = next(kind for kind in deck if natures[kind].area != natures[first].area)
            deck.remove(second)
            ends_s = max(ends_s, add(second, at_s + chance.uniform(*LATER_S)))
        at_s = ends_s + chance.uniform(*PAUSE_S)
    return [fault for fault in faults if fault.ends_s <= duration_s]


def script(steps: Sequence[tuple[str, float]], *, first_s: float, pause_s: float) -> list[Planned]:
    """Return these kinds one after the other, each for so many seconds."""
    faults, at_s = [], first_s
    for number, (kind, lasts_s) in enumerate(steps, start=1):
        faults.append(Planned(number, kind, at_s, at_s + lasts_s, f"script {number} {kind}"))
        at_s += lasts_s + pause_s
    return faults


def _shuffled(natures: Mapping[str, Nature], chance: random.Random) -> list[str]:
    cards = sorted(natures)
    chance.shuffle(cards)
    return cards
