"""What every face calls calls: their ids, and the finish reason of a choice that has some. Knows no face."""

from __future__ import annotations

import secrets

from common.types import FinishReason


def draw_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def finish_reason(reason: FinishReason | None, *, called: bool) -> str | None:
    """A choice that was cut says so, calls or not."""
    return "tool_calls" if reason is FinishReason.STOP and called else reason
