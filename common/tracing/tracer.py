"""Where a process's traces begin, or go on: one tracer per process, made at its start and closed at its end.

Without `tracing.otlp_endpoint` there is none, and nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from common.clock import Clock
from common.config import TracingConfig
from common.errors import ConfigError
from common.tracing.span import NO_SPAN, Span, Value

ReadHeader = Callable[[str], str]
"""The value of a header by its name in lower case; "" = it was not sent."""


class Tracer(Protocol):
    def serve(
        self, name: str, header: ReadHeader, *, start_s: float | None = None, attributes: Mapping[str, Value] | None = None
    ) -> Span:
        """A span of whoever was asked for something, under the span that the headers name, if they do."""
        ...

    async def close(self) -> None:
        """Sends what was not sent yet, within a few seconds."""
        ...


class NoTracer:
    def serve(
        self, name: str, header: ReadHeader, *, start_s: float | None = None, attributes: Mapping[str, Value] | None = None
    ) -> Span:
        return NO_SPAN

    async def close(self) -> None:
        return


def make_tracer(config: TracingConfig, *, service: str, instance: str, clock: Clock) -> Tracer:
    """Raises ConfigError if traces are wanted and OpenTelemetry is not there."""
    if config.otlp_endpoint is None:
        return NoTracer()
    try:
        from common.tracing.otlp import OtlpTracer
    except ModuleNotFoundError as error:
        raise ConfigError(
            "tracing.otlp_endpoint is set, but OpenTelemetry is missing: pip install 'pdserve[otel]'",
            param="tracing.otlp_endpoint",
        ) from error
    return OtlpTracer(config, config.otlp_endpoint, service=service, instance=instance, clock=clock)


def header_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> ReadHeader:
    """Of a gRPC call's metadata."""
    known = {key: value for key, value in metadata or () if isinstance(value, str)}
    return lambda name: known.get(name, "")
