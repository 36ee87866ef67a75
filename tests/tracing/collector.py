"""A collector of spans: OTLP by HTTP, as a real one takes it, kept in memory."""

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class SpanSeen:
    """A span as it arrived; ids in hexadecimal, `parent` empty for a trace's first."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    attributes: dict[str, str]


class Collector:
    """Listens on a free port of 127.0.0.1 for as long as the `with` block lasts.

    `thaw` is cleared to let it take connections and answer none.
    """

    def __init__(self) -> None:
        self.spans: list[SpanSeen] = []
        self.thaw = threading.Event()
        self.thaw.set()
        self.asked = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.asked.set()
                collector.thaw.wait()
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.spans += _spans_in(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a program send its spans here, and soon."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}

    def of(self, trace: str) -> dict[str, SpanSeen]:
        """Return the spans of a trace by their names."""
        return {span.name: span for span in self.spans if span.trace == trace}


def _spans_in(request: ExportTraceServiceRequest) -> list[SpanSeen]:
    return [
        SpanSeen(
            service=_texts(told.resource.attributes)["service.name"],
            name=span.name,
            trace=span.trace_id.hex(),
            span=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            attributes=_texts(span.attributes),
        )
        for told in request.resource_spans
        for scope in told.scope_spans
        for span in scope.spans
    ]


def _texts(attributes: Any) -> dict[str, str]:
    return {pair.key: str(pair.value.string_value or pair.value.int_value) for pair in attributes}
