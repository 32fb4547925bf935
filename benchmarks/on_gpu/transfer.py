"""KV from one process to another: how fast against what the device copies, and how much of it hides behind a prompt's
computation.

On a GPU both processes share it and the link is cuda_ipc; with `--device cpu` the same code runs over shm. Everything is
verified: each piece's sums on both sides, and in the end the bytes themselves.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from benchmarks.on_gpu.report import Figure, Report
from benchmarks.on_gpu.settings import Settings, engine_of
from common.blocks import num_blocks
from common.clock import SystemClock
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.core import group_ends
from common.engine.device_memory import DeviceAllocation
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.device import region_of, region_of_pool
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion, PoolMemory
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import TransportOffer

SECRET = derive_secret("benchmark")
PATIENCE_S = 120.0
LAYER_GROUPS = 6
ROUNDS = 8


@dataclass(frozen=True)
class Connect:
    offers: tuple[TransportOffer, ...]
    num_blocks: int


@dataclass(frozen=True)
class PushAll:
    """Everything at once, out of a pool of random bytes."""

    ticket: Ticket


@dataclass(frozen=True)
class Prefill:
    """A prompt is computed, and its layers leave in groups meanwhile; with `ticket` None it is only computed."""

    ticket: Ticket | None
    num_tokens: int


@dataclass(frozen=True)
class Done:
    digests: dict[int, bytes]
    started_s: float
    computed_s: float  # when the last layer of the prompt was computed
    sums: list[bytes]  # of the source blocks


def run_transfer(report: Report) -> None:
    context = multiprocessing.get_context("spawn")
    control, theirs = context.Pipe()
    model, tokens = ("random:llama-3-8b", (1024, 8192)) if report.device == "cuda" else ("random:toy", (64, 256))
    process = context.Process(target=prefill_process, args=(theirs, report.device, model, max(tokens)), name="prefill")
    process.start()
    theirs.close()
    try:
        asyncio.run(measure(report, control, model, tokens))
        control.send(None)
        process.join(PATIENCE_S)
    finally:
        if process.is_alive():
            process.kill()
            process.join()


async def measure(report: Report, control: Connection, model: str, tokens: tuple[int, ...]) -> None:
    layout: KVLayout = await asyncio.to_thread(control.recv)
    blocks = num_blocks(max(tokens), layout.block_tokens)
    region, kind = pool_of(report.device, layout, blocks)
    receiver = KVReceiver(region, layout, "d", 1, SECRET, SystemClock())
    offers = await receiver.start([kind], "127.0.0.1")
    await ask(control, Connect(tuple(offers), blocks))

    async def transfer(num_tokens: int, prompt: bool) -> tuple[Done, float]:
        needed = num_blocks(num_tokens, layout.block_tokens)
        incoming = receiver.open(
            request_id="r",
            attempt=0,
            prefill=WorkerRef("p", 1, ""),
            first_block=0,
            blocks=range(needed),
            num_tokens=num_tokens,
            ttl_s=PATIENCE_S,
        )
        order = Prefill(incoming.ticket, num_tokens) if prompt else PushAll(incoming.ticket)
        done = await ask(control, order)
        await incoming.complete(Seal(incoming.ticket.nonce, num_tokens, done.digests))
        usable_s = time.monotonic()
        if contents_of(region, needed) != done.sums:
            raise AssertionError("what arrived is not what was sent")
        return done, usable_s

    for num_tokens in tokens:
        payload = num_blocks(num_tokens, layout.block_tokens) * layout.block_bytes
        times = []
        for _ in range(ROUNDS):
            done, usable_s = await transfer(num_tokens, prompt=False)
            times.append(usable_s - done.started_s)
        seconds = statistics.median(times[2:])
        what = f"{kind}, {num_tokens} tokens, {payload / 2**20:.0f} MiB, first push to usable"
        target = {1024: 0.6, 8192: 0.85}.get(num_tokens)
        report.add(
            Figure("T1", what, seconds * 1e3, "ms"),
            Figure(
                "T1",
                what,
                payload / seconds / 1e9,
                "GB/s",
                payload / seconds / report.roof.payload_bytes_per_s,
                "payload of the measured copy",
                target,
            ),
        )
    for num_tokens in tokens:
        exposed, alone = [], []
        for _ in range(ROUNDS // 2):
            done, usable_s = await transfer(num_tokens, prompt=True)
            exposed.append((usable_s - done.computed_s) / (usable_s - done.started_s))
            plain = await ask(control, Prefill(None, num_tokens))
            alone.append((plain.computed_s - plain.started_s) / (done.computed_s - done.started_s))
        what = f"{kind}, layers of a prompt of {num_tokens} in {LAYER_GROUPS} groups: share of the time after the last layer"
        report.add(
            Figure("T3", what, statistics.median(exposed[1:]), "", target=0.15, lower_is_better=True),
            Figure("T3", "the prompt alone against the prompt that is sent meanwhile", statistics.median(alone[1:]), ""),
        )
    await receiver.close()


async def ask(control: Connection, order: object) -> Done:
    control.send(order)
    async with asyncio.timeout(PATIENCE_S):
        answer: Done = await asyncio.to_thread(control.recv)
    return answer


def pool_of(device: str, layout: KVLayout, blocks: int) -> tuple[BlockRegion, str]:
    if device == "cuda":
        memory = DeviceAllocation(layout.block_bytes * blocks, torch.device("cuda", 0))
        return region_of(memory, layout.block_bytes), "cuda_ipc"
    return BlockRegion.create_shared(layout.block_bytes, blocks), "shm"


def contents_of(region: BlockRegion, blocks: int) -> list[bytes]:
    if region.on_device:
        return region.device.contents([(block * region.block_bytes, region.block_bytes) for block in range(blocks)])  # type: ignore[attr-defined,no-any-return]
    return [bytes(region.block(block)) for block in range(blocks)]


# -- the prefill side --------------------------------------------------------------------------------------------------


def prefill_process(control: Connection, device: str, model: str, most_tokens: int) -> None:
    asyncio.run(_prefill(control, device, model, most_tokens))


async def _prefill(control: Connection, device: str, model: str, most_tokens: int) -> None:
    settings = Settings(
        device,
        dtype="auto" if device == "cuda" else "float32",
        kernels="auto" if device == "cuda" else "torch",
        kv_pool_tokens=most_tokens + 64,
        max_model_tokens=most_tokens,
    )
    memory = PoolMemory(touch=True)
    engine = engine_of(model, settings, [], memory=memory)
    layout = engine.layout
    region = region_of_pool(memory, engine.device_memory, layout.block_bytes)
    engine.pool.tensor.normal_()
    sender = KVSender(region, layout, "p", 1, SECRET, SystemClock())
    control.send(layout)
    ends = group_ends(layout.num_layers, LAYER_GROUPS)
    while (order := await asyncio.to_thread(control.recv)) is not None:
        match order:
            case Connect():
                await sender.connect("d", 1, order.offers, order.num_blocks)
                control.send(Done({}, 0.0, 0.0, []))
            case PushAll():
                outgoing = sender.open(order.ticket)
                started_s = time.monotonic()
                await outgoing.push([(block, 1 + block) for block in range(len(order.ticket.blocks))])
                account = await outgoing.finish()
                control.send(Done(dict(account.digests), started_s, started_s, _sent(region, len(order.ticket.blocks))))
            case Prefill():
                control.send(await _compute(engine, region, sender, order, ends))
    await sender.close()


async def _compute(engine, region, sender, order: Prefill, ends) -> Done:  # type: ignore[no-untyped-def]
    loop = asyncio.get_running_loop()
    needed = num_blocks(order.num_tokens, engine.layout.block_tokens)
    outgoing = None if order.ticket is None else sender.open(order.ticket)
    pairs = [(block, 1 + block) for block in range(needed)]
    step = ScheduledBatch((SequenceSlice([index % 500 for index in range(order.num_tokens)], 0, [block for _, block in pairs]),))
    groups: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
    first = 0
    started_s = time.monotonic()

    def layer_done(num_layers: int) -> None:
        nonlocal first
        if num_layers in ends:
            loop.call_soon_threadsafe(groups.put_nowait, (first, num_layers))
            first = num_layers

    computing = asyncio.create_task(asyncio.to_thread(engine.runner.execute, step, layer_done))
    computed_s = started_s
    while computed_s == started_s:
        first_layer, end_layer = await groups.get() or (0, 0)
        if end_layer == engine.layout.num_layers:
            computed_s = time.monotonic()
        if outgoing is not None:
            await outgoing.push(pairs, (first_layer, end_layer))
    digests = {} if outgoing is None else dict((await outgoing.finish()).digests)
    await computing
    return Done(digests, started_s, computed_s, _sent(region, needed))


def _sent(region: BlockRegion, blocks: int) -> list[bytes]:
    if region.on_device:
        return region.device.contents([((1 + block) * region.block_bytes, region.block_bytes) for block in range(blocks)])  # type: ignore[attr-defined,no-any-return]
    return [bytes(region.block(1 + block)) for block in range(blocks)]
