"""Spans of the SDK, without anybody to take them."""

from __future__ import annotations

import asyncio
import logging

import pytest

from common.clock import SystemClock
from common.config import TracingConfig
from common.tracing.otlp import OtlpTracer


@pytest.mark.long
async def test_a_collector_that_is_away_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Several batches are left, each of which would be tried for seconds."""
    caplog.set_level(logging.CRITICAL)
    tracer = OtlpTracer(TracingConfig(), "http://127.0.0.1:9", service="s", instance="i", clock=SystemClock())
    for _ in range(2000):
        tracer.serve("x", lambda name: "").end()
    async with asyncio.timeout(120):
        await tracer.close()
