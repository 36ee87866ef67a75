"""Spans of published events, for OpenTelemetry. Imported only where traces are on.

Guarantees:
- A span is made once Kafka has acknowledged its event: as a child of the event's `traceparent`,
  which itself leaves as it came.
- Only events of sampled traces have one, of a chunk at most SPANS_PER_CHUNK.
- A collector that is away or frozen costs spans, never time: a thread of its own sends them, from
  a queue that drops the oldest; the end of the process waits STOP_WITHIN_S for it at most.

Where the spans go, how many wait and which are sampled is said by the OTEL_* variables, which the
SDK reads itself.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

from outbox_relay import __version__
from outbox_relay.reader import Row

SPANS_PER_CHUNK = 20
STOP_WITHIN_S = 1.0
KEY_MAX_CHARACTERS = 200
# As the database writes it: headers of a sampled trace (W3C Trace Context), the rest looks no
# further.
SAMPLED = re.compile(
    r'"traceparent": "(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f][13579bdf]["-]'
).search

log = structlog.get_logger()


class Traces:
    """Where the spans of this process go.

    Raises:
        ValueError: an OTEL_* variable has a value that the SDK can't use.
    """

    def __init__(self) -> None:
        if not logging.getLogger().isEnabledFor(logging.DEBUG):
            # The SDK tells of every attempt; we say once what it comes to.
            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        named = Resource.create({"service.name": "outbox-relay", "service.version": __version__})
        self._exporter = _Exporter()
        self._provider = TracerProvider(
            resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("outbox_relay", __version__)

    def of(self, topic: str) -> "Spans":
        """Return the spans of a new session of a topic."""
        return Spans(self._tracer, topic)

    def close(self) -> None:
        """Send what waits, for STOP_WITHIN_S seconds at most."""
        self._exporter.closing = True
        # The SDK would wait for half a minute.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(STOP_WITHIN_S)


class Spans:
    """The spans of one session: what it sent and Kafka has not acknowledged is forgotten with it.

    Not more of them wait than rows are on their way.
    """

    def __init__(self, tracer: Tracer, topic: str) -> None:
        self._tracer = tracer
        self._name = f"publish {topic}"
        self._attributes = {
            "messaging.system": "kafka",
            "messaging.destination.name": topic,
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
        }
        self._sent_rows = self._published_rows = 0
        # At which row, of which trace, since when; id and key.
        self._waiting: deque[tuple[int, SpanContext, int, int, str]] = deque()

    def sent(self, rows: Sequence[Row]) -> None:
        """Note rows that are about to be handed to Kafka."""
        self._sent_rows += len(rows)
        now_ns = time.time_ns()
        sampled = ((row, found) for row in rows if (found := SAMPLED(row[3])))
        for row, found in islice(sampled, SPANS_PER_CHUNK):
            parent = SpanContext(
                int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=TraceFlags(1)
            )
            key = row[1][:KEY_MAX_CHARACTERS]
            self._waiting.append((self._sent_rows, parent, now_ns, row[0], key))

    def published(self, rows: int) -> None:
        """Make the spans of the next `rows` rows, which Kafka has acknowledged."""
        self._published_rows += rows
        now_ns = time.time_ns()
        while self._waiting and self._waiting[0][0] <= self._published_rows:
            _, parent, begun_ns, row_id, key = self._waiting.popleft()
            self._tracer.start_span(
                self._name,
                set_span_in_context(NonRecordingSpan(parent)),
                SpanKind.PRODUCER,
                {**self._attributes, "messaging.kafka.message.key": key, "outbox.id": row_id},
                start_time=begun_ns,
            ).end(now_ns)


class _Exporter(OTLPSpanExporter):
    """Says once that nobody takes the spans, and once that somebody does again."""

    closing = False
    _failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        failing = result is not SpanExportResult.SUCCESS
        # Not while the process ends: the interpreter must not find this thread in the log's lock.
        if failing != self._failing and not self.closing:
            self._failing = failing
            if failing:
                log.warning("traces are dropped: no collector takes them (LOG_LEVEL=DEBUG: why)")
            else:
                log.info("traces are taken again")
        return result
