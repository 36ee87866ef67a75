"""How long a lane rests between two steps while news keeps coming.

Up to some thousand events a second it asks again as soon as it can, and each event comes with the
least delay. Beyond, it collects what comes, for longer the more comes: a step costs Postgres, Kafka
and us more than a millisecond of processor time, which then is taken from those who write.
"""

import time

SHORTEST_S = 0.001
LONGEST_S = 0.04
SWIFT_ROWS_PER_S = 2_500
# Not far above: writers that we slow down must not get below it, where we would take still more.
COLLECTING_ROWS_PER_S = 3_200
# What came longer ago doesn't count.
MEMORY_S = 0.25


class Pace:
    """Watches how many rows a second come."""

    def __init__(self) -> None:
        self._rows_per_s = 0.0
        self._at_s = time.monotonic()

    def rest_s(self, rows: int) -> float:
        """Return the rest after a step that found so many rows, in seconds."""
        now_s = time.monotonic()
        elapsed_s = max(now_s - self._at_s, SHORTEST_S)
        self._at_s = now_s
        weight = min(1.0, elapsed_s / MEMORY_S)
        self._rows_per_s += weight * (rows / elapsed_s - self._rows_per_s)
        beyond = self._rows_per_s - SWIFT_ROWS_PER_S
        share = beyond / (COLLECTING_ROWS_PER_S - SWIFT_ROWS_PER_S)
        return max(SHORTEST_S, min(1.0, share) * LONGEST_S)
