"""What is refused before anything is done for it."""

from __future__ import annotations

from typing import Any

import pytest

from common.clock import ManualClock
from common.codec import request_to_wire, ticket_to_wire
from common.engine.grammar import CompiledGrammar
from common.errors import DeadlineExceeded
from common.types import KVLayout, Request, SamplingParams, Ticket
from common.wire import worker_pb2
from prefill_worker.runs import PrefillRuns

LAYOUT = KVLayout("m", "t", 1, 1, 8, 4, "float32", True)


class Nothing:
    """Whoever is asked for anything here was asked too late."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} was reached")


async def no_grammar(request: Request) -> CompiledGrammar | None:
    raise AssertionError("a grammar was compiled")


@pytest.mark.parametrize(("timeout_s", "ttl_s"), [(0.0, 10.0), (-1.0, 10.0), (10.0, 0.0)])
async def test_a_request_whose_time_is_over_opens_no_transfer(timeout_s: float, ttl_s: float) -> None:
    nothing: Any = Nothing()
    runs = PrefillRuns(nothing, nothing, nothing, check=nothing, compile_grammar=no_grammar, metrics=nothing, clock=ManualClock())
    request = Request("r", "m", (1, 2, 3), SamplingParams(max_tokens=4, seed=1), timeout_s=timeout_s)
    ticket = Ticket(bytes(16), "r", 0, "d", 1, "p", 1, 0, (1,), 3, LAYOUT.fingerprint, ttl_s)
    message = worker_pb2.PrefillRequest(request=request_to_wire(request), ticket=ticket_to_wire(ticket))
    with pytest.raises(DeadlineExceeded):
        await runs.run(message)
