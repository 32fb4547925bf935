"""Who does not trace pays nothing; who wants to and has no SDK is told so at the start."""

from __future__ import annotations

import sys

import pytest

from common.clock import ManualClock
from common.config import Config, TracingConfig
from common.errors import ConfigError
from common.tracing.span import NO_SPAN, current_span, entered, within
from common.tracing.tracer import NoTracer, header_of, make_tracer


def test_a_missing_sdk_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "common.tracing.otlp", None)
    config = TracingConfig(otlp_endpoint="http://127.0.0.1:4317")
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[otel\]'") as raised:
        make_tracer(config, service="s", instance="i", clock=ManualClock())
    assert raised.value.param == "tracing.otlp_endpoint"


def test_an_endpoint_is_a_url() -> None:
    for wrong in ("collector:4317", "ftp://x", "http://", "http://a b"):
        with pytest.raises(ValueError, match="otlp_endpoint"):
            Config.model_validate({"models": [{"name": "m", "source": "m"}], "tracing": {"otlp_endpoint": wrong}})


def test_no_span_takes_everything_and_does_nothing() -> None:
    assert current_span() is NO_SPAN
    assert NO_SPAN.child("x", start_s=1.0, attributes={"a": 1}) is NO_SPAN
    assert (NO_SPAN.headers, NO_SPAN.trace_id) == ((), "")
    with entered(NO_SPAN), within(NO_SPAN) as span:
        span.set({"a": 1})
        span.event("b")
        assert current_span() is NO_SPAN
    assert not NoTracer().serve("x", header_of((("traceparent", "00-1-1-01"),)))


def test_headers_of_a_call_are_its_textual_metadata() -> None:
    read = header_of((("traceparent", "a"), ("blob-bin", b"b")))
    assert [read(name) for name in ("traceparent", "blob-bin", "tracestate")] == ["a", "", ""]
