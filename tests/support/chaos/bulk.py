"""Many healthy block transfers between two processes, every byte of them compared: what must never raise an alarm.

    test process: KVReceiver over a pool  <--- shm | tcp | nixl ---  forked process: KVSender over a pool

The blocks are small, so that many fit into little time: what is exercised is everything per piece, not the copying. Contents are
drawn from a seed that both sides know; the pool blocks of a ticket are in random order, and every other transfer travels in
groups of layers.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.blocks import num_blocks
from common.clock import SystemClock
from common.codec import ticket_from_wire, ticket_to_wire
from common.errors import ClusterError, HandoffError
from common.types import KVLayout, WorkerRef
from common.wire import types_pb2
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import TransportOffer
from support.chaos.zygote import Zygote

BLOCKS = 1024
PUSH_BLOCKS = 128
TOKEN = "bulk-token"
LAYOUT = KVLayout(
    model_digest="0" * 64,
    tokenizer_digest="0" * 64,
    num_layers=4,
    num_kv_heads=1,
    head_dim=4,
    block_tokens=4,
    dtype="float32",
    exact=True,
)
WRITER, READER = "bulk/prefill/0", "bulk/decode/0"


@dataclass(frozen=True)
class BulkResult:
    blocks: int
    alarms: int  # transfers that failed, though nothing was wrong
    wrong: int  # transfers that were accepted with other bytes than were sent
    seconds: float
    detail: str = ""


def _contents(seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size=(BLOCKS, LAYOUT.block_bytes), dtype=np.uint8)


async def move_blocks(zygote: Zygote, kind: str, at_least: int) -> BulkResult:
    """Moves blocks until so many have arrived."""
    region = BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS)
    receiver = KVReceiver(region, LAYOUT, READER, 1, derive_secret(TOKEN), SystemClock())
    offers = await receiver.start([kind], "127.0.0.1")
    control, theirs = socket.socketpair()
    halts, their_halts = socket.socketpair()
    order = {"role": "writer", "worker_id": WRITER, "offers": [[offer.kind, offer.address] for offer in offers]}
    pid = zygote.fork(order, theirs, their_halts)
    for end in (theirs, halts, their_halts):
        end.close()
    reader, writer = await asyncio.open_connection(sock=control)
    moved = alarms = wrong = 0
    detail = ""
    started_s = time.monotonic()
    chance = random.Random(1)
    try:
        hello = json.loads(await reader.readline() or b"{}")
        if hello.get("kind") != kind:
            raise ClusterError(f"the writer did not connect over {kind}: {hello}")
        while moved < at_least:
            seed = moved
            blocks = list(range(BLOCKS))
            chance.shuffle(blocks)
            incoming = receiver.open(
                request_id=f"bulk{seed}",
                attempt=0,
                prefill=WorkerRef(WRITER, 1, "-"),
                first_block=0,
                blocks=blocks,
                num_tokens=BLOCKS * LAYOUT.block_tokens,
                ttl_s=60.0,
            )
            message = {"ticket": ticket_to_wire(incoming.ticket).SerializeToString().hex(), "seed": seed}
            writer.write(json.dumps(message).encode() + b"\n")
            answer = json.loads(await reader.readline())
            moved += BLOCKS
            try:
                if "error" in answer:
                    raise HandoffError(answer["error"])
                digests = {int(block): bytes.fromhex(digest) for block, digest in answer["digests"].items()}
                await incoming.complete(Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, digests))
            except HandoffError as error:
                alarms += 1
                detail = f"{error.code}: {error.message}"
                await incoming.abandon(_nobody_to_ask)
                continue
            arrived = np.frombuffer(region.buffer, dtype=np.uint8).reshape(BLOCKS, LAYOUT.block_bytes)[blocks]
            if not np.array_equal(arrived, _contents(seed)):
                wrong += 1
            del arrived
    finally:
        writer.write_eof()
        await reader.read()
        writer.close()
        await receiver.close()
        await asyncio.to_thread(zygote.reap, pid)
        region.close()
    return BulkResult(moved, alarms, wrong, time.monotonic() - started_s, detail)


async def _nobody_to_ask() -> None:
    """The writer has answered: it is not at it any more."""


async def serve_writer(order: dict[str, Any], control: socket.socket) -> None:
    """In the child: writes what it is given tickets for, until the test hangs up."""
    region = BlockRegion.create_shared(LAYOUT.block_bytes, BLOCKS)
    sender = KVSender(region, LAYOUT, WRITER, 1, derive_secret(TOKEN), SystemClock())
    reader, writer = await asyncio.open_connection(sock=control, limit=1 << 22)
    try:
        offers = [TransportOffer(kind, address) for kind, address in order["offers"]]
        said: dict[str, Any] = {"kind": await sender.connect(READER, 1, offers, BLOCKS)}
    except HandoffError as error:
        said = {"error": f"{error.code}: {error.message}"}
    writer.write(json.dumps(said).encode() + b"\n")
    source = np.frombuffer(region.buffer, dtype=np.uint8).reshape(BLOCKS, LAYOUT.block_bytes)
    while line := await reader.readline():
        message = json.loads(line)
        ticket = ticket_from_wire(types_pb2.Ticket.FromString(bytes.fromhex(message["ticket"])))
        source[:] = _contents(message["seed"])
        try:
            outgoing = sender.open(ticket)
            in_layers = (message["seed"] // BLOCKS) % 2 == 1
            for start in range(0, BLOCKS, PUSH_BLOCKS):
                pairs = [(block, block) for block in range(start, min(start + PUSH_BLOCKS, BLOCKS))]
                for layers in ((0, 1), (1, LAYOUT.num_layers)) if in_layers else (None,):
                    await outgoing.push(pairs, layers)
            account = await outgoing.finish()
            answer: dict[str, Any] = {"digests": {block: digest.hex() for block, digest in account.digests.items()}}
        except HandoffError as error:
            answer = {"error": f"{error.code}: {error.message}"}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
    await sender.close()
    writer.close()


assert num_blocks(BLOCKS * LAYOUT.block_tokens, LAYOUT.block_tokens) == BLOCKS
