"""Tickets that are old, used, altered or invented: whatever a prefill worker holds, it writes only what is wanted now."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from common.codec import request_to_wire, ticket_from_wire, ticket_to_wire
from common.errors import PdserveError, TicketRefused
from common.rpc import connect, error_from_rpc
from common.types import Request, Ticket, WorkerRef
from common.wire import worker_pb2, worker_pb2_grpc
from kvtransfer.receiver import CREDIT_BYTES, KVReceiver
from kvtransfer.ticket import derive_secret, mint
from support.planted_links import Plants
from support.workers import TOKEN, Workers, request, running_workers
from support.zoo import ENGINE, REMOTE, UNCACHED, Oracle, prompt_of, until_free


async def run_on_prefill(workers: Workers, message: worker_pb2.PrefillRequest) -> worker_pb2.PrefillReply:
    """As a decode worker calls it, or somebody who got hold of a message."""
    channel = connect(workers.prefill_refs[0].address, TOKEN)
    try:
        return await worker_pb2_grpc.PrefillStub(channel).Run(message, timeout=60)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    finally:
        await channel.close(None)


def pool_of(workers: Workers) -> bytes:
    return bytes(workers.decode._host.engine.pool.buffer)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_z01_a_used_ticket_writes_nothing(model_path: Path, oracle: Oracle, plants: Plants, transport: str) -> None:
    """Z01, vllm#52234. There: a consumed KV reference was answered with 200 and the previous prompt's tokens.
    Ours: a nonce admits one writer, once; a replayed ticket is refused by the prefill worker, and by the decode worker if the
    prefill worker has forgotten it, and not a byte of the pool changes."""
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE, transports=(transport,)) as workers:
        work = request(prompt_of(70), max_tokens=6)
        assert oracle.agrees(work, await workers.generate(work))
        (message,) = plants.runs
        await workers.assert_nothing_leaks()  # the step after an answer's last writes as well
        before = pool_of(workers)
        with pytest.raises(TicketRefused, match="used or released before"):
            await run_on_prefill(workers, message)
        workers.prefill[0]._handoff._sender._spent.clear()
        with pytest.raises(TicketRefused, match="the decode worker refused the ticket: unknown"):
            await run_on_prefill(workers, message)
        assert pool_of(workers) == before
        await workers.assert_nothing_leaks()
        again = await workers.generate(work)
        assert oracle.agrees(work, again)
        assert again.started is not None
        assert again.started.cached_tokens == 64


@pytest.mark.parametrize(
    ("transport", "guarded"),
    [("shm", True), ("inproc", True), ("inproc", False)],
    ids=["shm", "inproc", "inproc, without the guard"],
)
async def test_z01_another_prompt_under_an_old_ticket(
    model_path: Path, oracle: Oracle, plants: Plants, monkeypatch: pytest.MonkeyPatch, transport: str, guarded: bool
) -> None:
    """Z01, vllm#52234. There: the blocks behind an old reference had a new owner, whose content was served.
    Ours: what the decode worker keeps of A stays A's, also when a prefill worker computes B and pushes it under A's ticket. The
    guard is who is let in; over inproc alone it is the only one."""
    async with running_workers(model_path, engine=ENGINE, decode=REMOTE, transports=(transport,)) as workers:
        a, b = request(prompt_of(70, 1), max_tokens=6), request(prompt_of(70, 2), max_tokens=6)
        assert oracle.agrees(a, await workers.generate(a))
        (message,) = plants.runs
        stale = worker_pb2.PrefillRequest(request=request_to_wire(b), ticket=message.ticket)
        workers.prefill[0]._handoff._sender._spent.clear()
        if guarded:
            with pytest.raises(TicketRefused):
                await run_on_prefill(workers, stale)
        else:
            monkeypatch.setattr(KVReceiver, "writer_opened", lambda receiver, link, nonce: CREDIT_BYTES)
            await run_on_prefill(workers, stale)
            monkeypatch.undo()
        again = await workers.generate(a)
        assert again.started is not None
        assert again.started.cached_tokens == 64
        assert oracle.agrees(a, again) is guarded
        await workers.assert_nothing_leaks()


# -- forged, altered, meant for others ---------------------------------------------------------------------------------

Change = dict[str, Any]
SIGNED: dict[str, tuple[Change, str]] = {
    "beyond the pool": ({"blocks": (0, 1, 2, 3, 2**32 - 1)}, "blocks"),
    "just beyond the pool": ({"blocks": (0, 1, 2, 3, 129)}, "blocks"),
    "one block twice": ({"blocks": (1, 1, 2, 3, 4)}, "blocks"),
    "too few blocks": ({"blocks": (1, 2)}, "first_block"),
    "no such logical block": ({"first_block": 1}, "first_block"),
    "another length": ({"num_tokens": 71}, "request_id"),
    "another request": ({"request_id": "other"}, "request_id"),
    "another prefill worker": ({"prefill": WorkerRef("tiny/prefill/7", 1, "unused")}, "prefill_worker_id"),
    "an earlier prefill worker": ({"prefill": WorkerRef("tiny/prefill/0", 0, "unused")}, "prefill_incarnation"),
    "another decode worker": ({"decode_worker_id": "tiny/decode/7"}, "decode_worker_id"),
    "an earlier decode worker": ({"decode_incarnation": 0}, "decode_incarnation"),
    "another layout": ({"block_tokens": 8}, "layout_fingerprint"),
    "for ever": ({"ttl_s": 1e300}, "ttl_s"),
    "another cluster": ({"secret": derive_secret("another token")}, "mac"),
}
ALTERED: dict[str, Change] = {
    "other blocks": {"blocks": (5, 6, 7, 8, 9)},
    "more time": {"ttl_s": 3000.0},
    "no proof": {"mac": b""},
    "another nonce": {"nonce": b"n" * 16},
}


def minted(workers: Workers, work: Request, **changes: Any) -> Ticket:
    layout = workers.decode._host.engine.layout
    block_tokens = changes.pop("block_tokens", layout.block_tokens)
    values: dict[str, Any] = {
        "secret": derive_secret(TOKEN),
        "layout": dataclasses.replace(layout, block_tokens=block_tokens),
        "request_id": work.request_id,
        "attempt": 1,
        "decode_worker_id": "tiny/decode/0",
        "decode_incarnation": 1,
        "prefill": workers.prefill_refs[0],
        "first_block": 0,
        "blocks": (1, 2, 3, 4, 5),
        "num_tokens": work.num_prompt_tokens,
        "ttl_s": 30.0,
    }
    return mint(**{**values, **changes})


async def test_z01_forged_and_out_of_range_tickets_cost_nothing(model_path: Path, oracle: Oracle, plants: Plants) -> None:
    """Z01, vllm#52234. There: an out-of-range block reference was read, and its content served as this prompt's.
    Ours: a ticket that does not fit in every field is refused with the field's name, before a token is computed for it."""
    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE, transports=("shm",)) as workers:
        work = request(prompt_of(70), max_tokens=4)
        assert oracle.agrees(work, await workers.generate(work))
        assert workers.decode._handoff._region.num_blocks == 129
        await workers.assert_nothing_leaks()  # the step after an answer's last writes as well
        before, computed = pool_of(workers), workers.prefill[0]._scheduler.totals.computed_tokens
        tickets = {name: (minted(workers, work, **change), param) for name, (change, param) in SIGNED.items()}
        honest = ticket_from_wire(plants.runs[0].ticket)
        tickets |= {name: (dataclasses.replace(honest, **change), "mac") for name, change in ALTERED.items()}
        for name, (ticket, param) in tickets.items():
            message = worker_pb2.PrefillRequest(request=request_to_wire(work), ticket=ticket_to_wire(ticket))
            with pytest.raises(TicketRefused) as refused:
                await run_on_prefill(workers, message)
            assert refused.value.param == param, name
        assert (pool_of(workers), workers.prefill[0]._scheduler.totals.computed_tokens) == (before, computed)
        # One that is right in every field, but was never offered: the owner of the memory has the last word.
        ticket = minted(workers, work)
        with pytest.raises(TicketRefused, match="unknown"):
            await run_on_prefill(workers, worker_pb2.PrefillRequest(request=request_to_wire(work), ticket=ticket_to_wire(ticket)))
        assert pool_of(workers) == before
        await workers.assert_nothing_leaks()
        assert oracle.agrees(work, await workers.generate(work))


@pytest.mark.parametrize("end", ["finished", "cancelled"])
async def test_z01_a_ticket_that_comes_late_finds_its_request_gone(
    model_path: Path, oracle: Oracle, plants: Plants, end: str
) -> None:
    """Z01, vllm#52234. There: a reference outlived its request.
    Ours: a Run that arrives for the first time when its request has ended is refused, and its blocks are the next owner's."""

    async def never_sent(call: Any, message: Any, timeout_s: float) -> Any:
        raise PdserveError("lost")

    async with running_workers(model_path, engine=UNCACHED, decode=REMOTE, num_prefill=2, transports=("tcp",)) as workers:
        work, other = request(prompt_of(70, 3), max_tokens=4), request(prompt_of(70, 4), max_tokens=4)
        plants.run = never_sent
        if end == "finished":
            workers.prefill_refs, kept = workers.prefill_refs[:1], workers.prefill_refs
            with pytest.raises(PdserveError, match="lost"):
                await workers.generate(work)
            workers.prefill_refs = kept
        else:
            call = workers.open(work)
            call.cancel()
            plants.run = None
            await workers.generate(work)  # whatever became of the first, there was a ticket for this one
        plants.run = None
        message = plants.runs[0]
        await until_free(workers, workers.decode_ref)
        assert oracle.agrees(other, await workers.generate(other))
        await until_free(workers, workers.decode_ref)  # the step after an answer's last writes as well
        before = pool_of(workers)
        with pytest.raises(TicketRefused):
            await run_on_prefill(workers, message)
        assert pool_of(workers) == before
        assert oracle.agrees(other, await workers.generate(other))
        await workers.assert_nothing_leaks()
