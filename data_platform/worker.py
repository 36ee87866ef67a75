"""The loop: fetch → decode → load → commit.

While Postgres works on a batch in a second thread, this one fetches and decodes the next: never
more than one ahead, and nothing is loaded before what came before it is committed.

Guarantees: it ends only when asked to, or by a fault of ours that only a restart can mend. An
outage of Postgres or Kafka is said once and waited out, with the group's membership kept.
"""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import TYPE_CHECKING

import structlog

from data_platform.batch import Decoded, decode
from data_platform.consumer import Source
from data_platform.errors import Cure, PlaceLostError, cure_of, told
from data_platform.events import Decoder
from data_platform.health import Health
from data_platform.loader import Loaded, Loader
from data_platform.star import Rows, rows_of

if TYPE_CHECKING:
    from data_platform.tracing import Traces

POLL_WAIT_S = 0.2
# While a batch is on its way: soon enough to see how it ended.
UNDER_WAY_POLL_S = 0.01
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 2.0
# SIGTERM: the batch in flight may take this long, everything this long (10 s are promised).
LAST_BATCH_S = 6.0
LEAVE_WITHIN_S = 9.0
# A batch is thousands of objects that live until it is loaded: looking at them every 700 new ones,
# Python's default, costs a tenth of our time.
COLLECT_AFTER_OBJECTS = 50_000
# The thread that talks to Postgres wants Python's lock back some thirty times a batch, and the one
# that decodes gives it up only after this long; at the default of 5 ms a batch waited for most of
# its time (40,000 events/s became 59,000).
SWITCH_INTERVAL_S = 0.0002

log = structlog.get_logger()


class Worker:
    """One member of the group; any number of them share the partitions."""

    def __init__(
        self,
        source: Source,
        loader: Loader,
        decoders: Mapping[str, Decoder],
        health: Health,
        *,
        traces: "Traces | None" = None,
    ) -> None:
        self._source = source
        self._loader = loader
        self._decoders = decoders
        self._health = health
        self._traces = traces
        self._begun_ns = 0
        self._stopping = threading.Event()
        self._wait_s = FIRST_WAIT_S
        self._waiting_for: str | None = None
        self._pool = ThreadPoolExecutor(1, "load")
        self._under_way: Future[Loaded] | None = None

    def run(self) -> None:
        """Load until SIGTERM or SIGINT; then finish the batch in hand and leave the group."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        gc.set_threshold(COLLECT_AFTER_OBJECTS)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        log.info("started", topics=list(self._decoders))
        while not self._stopping.is_set():
            self._turn()
        self._drain()
        self._pool.shutdown()
        self._source.close()
        self._loader.close()
        log.info("stopped")

    def _turn(self) -> None:
        self._health.beat({f"{p.topic} {p.partition}": w for p, w in self._source.stopped.items()})
        try:
            self._go_on()
        except PlaceLostError as error:
            self._drain()
            log.info("place_lost", what=str(error))
            self._health.places_lost.inc()
            self._source.forget()
            self._source.wait(FIRST_WAIT_S)
        except Exception as error:
            self._drain()
            if cure_of(error) is not Cure.WAIT:
                raise
            self._source.forget()
            self._wait_out(error)

    def _go_on(self) -> None:
        if self._source.unsettled:
            self._finish()  # one connection for claims and loads
            self._source.settle(self._loader.claim)
        slices = self._source.fetch(UNDER_WAY_POLL_S if self._under_way else POLL_WAIT_S)
        if slices:
            begun_ns = time.time_ns()
            batch = decode(slices, self._decoders)
            rows = rows_of(batch.rows)
            self._source.confirm(slices)
            self._finish()
            self._begun_ns = begun_ns
            self._under_way = self._pool.submit(self._load, batch, rows)
        elif self._under_way is not None and self._under_way.done():
            self._finish()
        elif self._under_way is None and self._source.at_end:
            self._recovered()

    def _load(self, batch: Decoded, rows: Rows) -> Loaded:
        with self._health.load_seconds.time():
            return self._loader.load(batch, rows)

    def _finish(self) -> None:
        """Wait for the batch on its way, which is bounded by the loader; raises what it raises."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            loaded = under_way.result()
            self._source.commit(loaded.slices)
            self._count(loaded)
            if self._traces is not None and not loaded.dead_letters:
                self._traces.loaded(loaded.slices, self._begun_ns)
            # A turn without records says nothing of a load that fails: they may just not be there
            # yet.
            self._recovered()

    def _drain(self) -> None:
        """Wait for the batch on its way, where something else has gone wrong, or we are to end."""
        try:
            self._finish()
        except Exception as error:
            if cure_of(error) is Cure.END:
                raise
            # Not lost: Postgres knows how far it got, and the next one begins there.
            log.info("load_failed", cause=told(error))

    def _count(self, loaded: Loaded) -> None:
        self._health.batches.inc()
        self._health.events.inc(loaded.events)
        self._health.new_events.inc(loaded.new_events)
        self._health.dead_letters.inc(loaded.dead_letters)
        if loaded.dead_letters:
            log.warning("dead_letters", records=loaded.dead_letters)

    def _wait_out(self, error: Exception) -> None:
        """Poll without partitions, so that the group keeps us, for longer each time."""
        cause = told(error)
        if self._waiting_for is None:
            log.warning("waiting", cause=cause)
        elif self._waiting_for != type(error).__name__:
            log.info("still_waiting", cause=cause)
        self._waiting_for = type(error).__name__
        self._health.waits_for(cause)
        self._health.waits.inc()
        until = time.monotonic() + self._wait_s
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        while (left_s := until - time.monotonic()) > 0 and not self._stopping.is_set():
            self._source.wait(min(left_s, POLL_WAIT_S))

    def _recovered(self) -> None:
        if self._waiting_for is not None:
            log.info("going_on")
            self._waiting_for = None
            self._wait_s = FIRST_WAIT_S
            self._health.waits_for(None)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping.set()
        self._loader.hurry(LAST_BATCH_S)
        # A broker that doesn't answer must not keep us: what is not committed is not done, and
        # the next worker does it.
        timer = threading.Timer(LEAVE_WITHIN_S, os._exit, args=(0,))
        timer.daemon = True
        timer.start()
