"""Spans of OpenTelemetry's SDK, exported over OTLP/gRPC in batches, from a thread of the SDK's.

Imported only where `tracing.otlp_endpoint` is set. Nothing here waits for the collector: spans that it does not take are dropped
by the SDK, which says so in the log. Further settings of the exporter (headers, certificates) are OTEL_EXPORTER_OTLP_*.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.clock import Clock
from common.config import TracingConfig
from common.tracing.span import Kind, Span, Value
from common.tracing.tracer import ReadHeader

_PROPAGATOR = TraceContextTextMapPropagator()
_KINDS = {
    Kind.INTERNAL: trace.SpanKind.INTERNAL,
    Kind.SERVER: trace.SpanKind.SERVER,
    Kind.CLIENT: trace.SpanKind.CLIENT,
}
_EXPORT_TIMEOUT_S = 5
_EXPORT_EVERY_MS = 1000
_CLOSING_S = 2.0


class OtlpTracer:
    def __init__(self, config: TracingConfig, endpoint: str, *, service: str, instance: str, clock: Clock) -> None:
        # The two clocks are compared once: a wall clock that is set later must not tear a span apart.
        self._epoch_ns = time.time_ns() - int(clock.monotonic_s() * 1e9)
        resource = Resource.create({"service.name": service, "service.instance.id": instance})
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)), resource=resource, shutdown_on_exit=False
        )
        self._exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter, schedule_delay_millis=_EXPORT_EVERY_MS))
        self._tracer = self._provider.get_tracer("pdserve")

    def serve(
        self, name: str, header: ReadHeader, *, start_s: float | None = None, attributes: Mapping[str, Value] | None = None
    ) -> Span:
        carrier = {key: value for key in _PROPAGATOR.fields if (value := header(key))}
        return self.start(_PROPAGATOR.extract(carrier, Context()), name, Kind.SERVER, start_s, attributes)

    def start(
        self, parent: Context, name: str, kind: Kind, start_s: float | None, attributes: Mapping[str, Value] | None
    ) -> Span:
        span = self._tracer.start_span(
            name, context=parent, kind=_KINDS[kind], attributes=attributes, start_time=self.wall_ns(start_s)
        )
        return _OtlpSpan(self, span)

    def wall_ns(self, at_s: float | None) -> int | None:
        return None if at_s is None else self._epoch_ns + int(at_s * 1e9)

    async def close(self) -> None:
        closing = asyncio.ensure_future(asyncio.to_thread(self._provider.shutdown))
        await asyncio.wait({closing}, timeout=_CLOSING_S)
        if not closing.done():
            await asyncio.to_thread(
                self._exporter.shutdown
            )  # the collector is away: what is left is dropped, one batch at a time
        await closing


class _OtlpSpan:
    def __init__(self, tracer: OtlpTracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    def __bool__(self) -> bool:
        return True

    @property
    def trace_id(self) -> str:
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, self._context)
        return tuple(carrier.items())

    @property
    def _context(self) -> Context:
        return trace.set_span_in_context(self._span, Context())

    def child(
        self,
        name: str,
        *,
        kind: Kind = Kind.INTERNAL,
        start_s: float | None = None,
        attributes: Mapping[str, Value] | None = None,
    ) -> Span:
        return self._tracer.start(self._context, name, kind, start_s, attributes)

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        self._span.add_event(name, attributes)

    def end(self, *, at_s: float | None = None, error: str = "") -> None:
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(self._tracer.wall_ns(at_s))
