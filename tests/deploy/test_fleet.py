"""What `pdserve autoscaler` prints."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from common.wire import registry_pb2
from deploy.commands import fleet


def test_the_autoscalers_report_is_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = registry_pb2.PoolAutoscaling(min_replicas=1, max_replicas=4, desired=2, ready=1, pressure=1.5, signal="tokens wait")
    flip = registry_pb2.AutoscalerDecision(
        at_s=1.0, action="flip", text="m/decode/0 becomes a prefill worker", reason="prompts wait", performed=False
    )
    report = registry_pb2.AutoscalerReport(
        models=[
            registry_pb2.ModelAutoscaling(
                model="m", mode=registry_pb2.AUTOSCALER_MODE_DRY_RUN, prefill=pool, decode=pool, idle_s=3.0, decisions=[flip]
            )
        ]
    )
    described = fleet.describe_autoscaler(report)
    assert described["models"][0]["mode"] == "dry-run"
    assert [one["role"] for one in described["models"][0]["pools"]] == ["prefill", "decode"]
    written = io.StringIO()
    monkeypatch.setattr(fleet, "out", Console(file=written, width=120))
    fleet._draw_model(described["models"][0])
    lines = written.getvalue().splitlines()
    assert lines[0] == "m  autoscaler dry-run, unused for 3 s"
    assert lines[2].split() == ["prefill", "1", "2", "1", "-", "4", "1.50", "tokens", "wait"]
    assert "m/decode/0 becomes a prefill worker (not done): prompts wait" in lines[-1]
