"""A span for each request, for OpenTelemetry. Imported only where traces are on.

Guarantees:
- A span continues the caller's `traceparent`, and takes its place: what the request writes into the
  outbox carries the span's own.
- Health, metrics and static files have none, and no span holds a query, a body or who asks.
- A collector that is away or frozen costs spans, never time: a thread of its own sends them, from
  a queue that drops the oldest; the end of the process waits STOP_WITHIN_S for it at most.

Where the spans go, how many wait and which are sampled is said by the OTEL_* variables, which the
SDK reads itself.
"""

import logging
import threading
from collections.abc import Sequence
from http import HTTPStatus
from importlib.metadata import version

import structlog
from flask import Flask, Response, g, request
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

STOP_WITHIN_S = 1.0

log = structlog.get_logger(__name__)


class Traces:
    """Where the spans of this process go. To be made after a fork, for a thread comes along.

    Raises:
        ValueError: an OTEL_* variable has a value that the SDK can't use.
    """

    def __init__(self) -> None:
        if not logging.getLogger().isEnabledFor(logging.DEBUG):
            # The SDK tells of every attempt; we say once what it comes to.
            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        release = version("concert-reservation")
        named = Resource.create({"service.name": "reservation-service", "service.version": release})
        self._exporter = _Exporter()
        self._provider = TracerProvider(
            resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("reservation_service", release)
        self._w3c = TraceContextTextMapPropagator()

    def follow(self, app: Flask) -> None:
        """Make a span for each request that `app` answers from now on."""
        app.before_request(self._begin)
        app.after_request(self._end)

    def close(self) -> None:
        """Send what waits, for STOP_WITHIN_S seconds at most."""
        self._exporter.closing = True
        # The SDK would wait for half a minute.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(STOP_WITHIN_S)

    def _begin(self) -> None:
        if request.blueprint is None or request.url_rule is None:
            return
        route = request.url_rule.rule
        carrier = {"traceparent": request.headers.get("traceparent", "")}
        g.span = span = self._tracer.start_span(
            f"{request.method} {route}",
            self._w3c.extract(carrier),
            SpanKind.SERVER,
            {
                "http.request.method": request.method,
                "http.route": route,
                "url.path": request.path,
                "url.scheme": request.scheme,
            },
        )
        self._w3c.inject(carrier, set_span_in_context(span))
        request.environ["HTTP_TRACEPARENT"] = carrier["traceparent"]

    def _end(self, response: Response) -> Response:
        span: Span | None = g.pop("span", None)
        if span is not None:
            span.set_attribute("http.response.status_code", response.status_code)
            if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                span.set_attribute("error.type", str(response.status_code))
                span.set_status(StatusCode.ERROR)
            span.end()
        return response


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
