"""What the relay costs those who write: their throughput beside it, against without it.

Writers do all they can, half of them single rows, half a booking's two rows in a transaction. The
stretches alternate (without, with, without, …), each compared with its neighbours, so that neither
a growing table nor a slower disk counts for or against the relay. It serves the rows of the same
stretch; those written without it are published in between.
"""

import time
from typing import Any

from benchmarks import events, latency, load
from benchmarks.results import Results
from benchmarks.surroundings import DELIVERIES, Surroundings

CLIENTS = 8
WITHOUT = "no relay"


def measure(around: Surroundings, results: Results, seconds: int) -> None:
    """Measure the writers without a relay, with one of each delivery in turn, and without."""
    _write(around, max(2, seconds // 4))
    without = _alone(around, results, seconds)
    for delivery in DELIVERIES:
        figure: dict[str, Any] = {"section": "writers", "contender": delivery}
        with around.steps.step(f"writers: {delivery}"), results.tolerating(figure):
            figure |= _beside(around, delivery, seconds)
            before, without = without, _alone(around, results, seconds)
            baseline = (before + without) / 2
            figure["ratio"] = round(figure["transactions_per_s"] / baseline, 3)
            results.add(figure)


def _alone(around: Surroundings, results: Results, seconds: int) -> float:
    with around.steps.step(f"writers: {WITHOUT}"):
        found = _write(around, seconds)
    results.add({"section": "writers", "contender": WITHOUT, "transactions_per_s": round(found)})
    return found


def _beside(around: Surroundings, delivery: str, seconds: int) -> dict[str, Any]:
    with around.relay(delivery):
        latency.catch_up(around, events.TOPIC)
        arrivals, after_id = around.arrivals(events.TOPIC), events.last_id(around.owner_url)
        written_per_s = _write(around, seconds)
        ended = time.monotonic()
        latency.catch_up(around, events.TOPIC)
        caught_up_s = time.monotonic() - ended
    verdict = arrivals.verify(len(latency.commit_times(around, after_id)))
    return {
        "transactions_per_s": round(written_per_s),
        "seconds": seconds,
        "caught_up_s": round(caught_up_s, 2),
    } | verdict.summary()


def _write(around: Surroundings, seconds: int) -> float:
    """Let the writers run and return their transactions per second."""
    return load.start(around, load.SINGLE, load.BOOKING, clients=CLIENTS, seconds=seconds).finish()
