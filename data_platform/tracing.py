"""Spans of loaded records, for OpenTelemetry. Imported only where traces are on.

Guarantees:
- A span is made once its record's batch is committed: as a child of the record's `traceparent`.
- Only records of sampled traces have one, of a batch at most SPANS_PER_BATCH.
- A collector that is away or frozen costs spans, never time: a thread of its own sends them, from
  a queue that drops the oldest; the end of the process waits STOP_WITHIN_S for it at most.

Where the spans go, how many wait and which are sampled is said by the OTEL_* variables, which the
SDK reads itself.
"""

import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from typing import cast

import structlog
from confluent_kafka import Message
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    set_span_in_context,
)

from data_platform.batch import Slice

SPANS_PER_BATCH = 20
STOP_WITHIN_S = 1.0
# W3C Trace Context, of a trace that is sampled.
SAMPLED = re.compile(
    rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f][13579bdf](?:-.*)?"
).fullmatch

log = structlog.get_logger()


class Traces:
    """Where the spans of this process go.

    Args:
        group: the consumer group's name.

    Raises:
        ValueError: an OTEL_* variable has a value that the SDK can't use.
    """

    def __init__(self, group: str) -> None:
        if not logging.getLogger().isEnabledFor(logging.DEBUG):
            # The SDK tells of every attempt; we say once what it comes to.
            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        release = version("concert-reservation")
        named = Resource.create({"service.name": "data-platform", "service.version": release})
        self._exporter = _Exporter()
        self._provider = TracerProvider(
            resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("data_platform", release)
        self._group = group

    def loaded(self, slices: Sequence[Slice], begun_ns: int) -> None:
        """Make the spans of a batch that is committed, and of which nobody has read the headers.

        A message whose headers can't be read crashes the process when they are read twice: see
        `batch.bad_record`. So not of a batch with dead letters, and once for each batch.
        """
        now_ns = time.time_ns()
        for part, message, parent in islice(_sampled(slices), SPANS_PER_BATCH):
            attributes: dict[str, str | int] = {
                "messaging.system": "kafka",
                "messaging.destination.name": part.topic,
                "messaging.destination.partition.id": str(part.partition),
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.consumer.group.name": self._group,
                "messaging.kafka.offset": message.offset() or 0,
                "messaging.kafka.message.key": str(message.key() or b"", "utf-8", "replace"),
            }
            self._tracer.start_span(
                f"process {part.topic}",
                set_span_in_context(NonRecordingSpan(parent)),
                SpanKind.CONSUMER,
                attributes,
                start_time=begun_ns,
            ).end(now_ns)

    def close(self) -> None:
        """Send what waits, for STOP_WITHIN_S seconds at most."""
        self._exporter.closing = True
        # The SDK would wait for half a minute.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(STOP_WITHIN_S)


def _sampled(slices: Sequence[Slice]) -> Iterator[tuple[Slice, Message, SpanContext]]:
    for part in slices:
        for message in part.messages:
            if found := SAMPLED(_traceparent(message)):
                trace_id, span_id = int(found[1], 16), int(found[2], 16)
                yield part, message, SpanContext(trace_id, span_id, True, TraceFlags(1))


def _traceparent(message: Message) -> bytes:
    try:
        headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
    except (SystemError, UnicodeDecodeError):  # a name that isn't UTF-8: a good record all the same
        return b""
    return next((value for name, value in headers if name == "traceparent" and value), b"")


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
                log.warning("traces_dropped", cause="no collector takes them (LOG_LEVEL=DEBUG)")
            else:
                log.info("traces_taken_again")
        return result
