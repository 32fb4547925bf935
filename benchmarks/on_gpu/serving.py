"""Engines that serve, as plain processes: the schedulers, the engine loop and KV transfer of the product, and pipes for the rest.

    driver ---- Job ----> whole engine                         prompts in chunks between decode steps, planned one ahead
    driver ---- Job ----> decode engine ---- Order ----> prefill engine
                                <=========== KV ============
                                <---------- Sealed -------
    driver <--- News ---- whoever decodes: when tokens came, one message for a step

Pipes stand where gRPC and the router are in service. Clocks are one: CLOCK_MONOTONIC of the machine.
"""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from prometheus_client import CollectorRegistry

from benchmarks.on_gpu.settings import DecodeSettings, PrefillSettings, Settings, engine_of
from benchmarks.on_gpu.sharing import Lane, Sharing, lanes
from common.blocks import num_blocks, num_full_blocks
from common.clock import SystemClock
from common.engine.core import Core
from common.engine.engine import Engine
from common.engine.loop import EngineLoop
from common.errors import EngineFailure, PdserveError
from common.metrics import WorkerMetrics, WorkerReadings
from common.types import KVLayout, Request, SampledToken, SamplingParams, StageTimings, Ticket, WorkerRef
from decode_worker.events import Event as DecodeEvent
from decode_worker.events import Failed, Output, RemotePrefill, RemotePrefillWanted
from decode_worker.scheduler import DecodeScheduler
from decode_worker.step_ahead import overlaps
from kvtransfer.device import region_of_pool
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion, PoolMemory
from kvtransfer.sender import KVSender, Outgoing
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import TransportOffer
from prefill_worker.scheduler import Event as PrefillEvent
from prefill_worker.scheduler import LayersComputed, PrefillScheduler, PromptComputed

SECRET = derive_secret("benchmark")
TTL_S = 120.0
LAYER_GROUPS = 6
STOP_S = 10.0


@dataclass(frozen=True)
class Job:
    name: str
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class News:
    """`tokens` (job, how many) came at `at_s`; `ended` are the jobs that are over."""

    at_s: float
    tokens: tuple[tuple[str, int], ...]
    ended: tuple[str, ...]
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ready:
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Introduction:
    offers: tuple[TransportOffer, ...]
    num_blocks: int


@dataclass(frozen=True)
class Order:
    request: Request
    ticket: Ticket


@dataclass(frozen=True)
class Sealed:
    name: str
    digests: dict[int, bytes]
    first_tokens: tuple[SampledToken, ...]
    cached_tokens: int


def whole_process(control: Connection, model: str, settings: Settings, limits: DecodeSettings) -> None:
    asyncio.run(_Decoding(control, None, model, settings, limits).run())


def decode_process(
    control: Connection, prefill: Connection, model: str, settings: Settings, limits: DecodeSettings, lane: Lane = nullcontext
) -> None:
    asyncio.run(_Decoding(control, prefill, model, settings, limits, lane).run())


def prefill_process(
    control: Connection, decode: Connection, model: str, settings: Settings, limits: PrefillSettings, lane: Lane = nullcontext
) -> None:
    asyncio.run(_prefill(control, decode, model, settings, limits, lane))


def shared_process(
    sharing: Sharing, device: str, decode: Callable[[Lane], None], prefill: Callable[[Lane], None], notes: Connection
) -> None:
    """Both roles as threads of one process, each on its lane: the functions above with all of their arguments but that. Says over
    `notes` how the device is divided. If one of them fails the process ends, for the other cannot go on alone."""
    decode_lane, prefill_lane, said = lanes(sharing, device)
    notes.send(Ready((said,)))
    with ThreadPoolExecutor(2) as threads:
        roles = [threads.submit(decode, decode_lane), threads.submit(prefill, prefill_lane)]
        failures = [role.exception() for role in wait(roles, return_when=FIRST_EXCEPTION).done]
        for failure in failures:
            if failure is not None:
                traceback.print_exception(failure)
                os._exit(1)


def metrics_of(model: str, role: str) -> WorkerMetrics:
    def read() -> WorkerReadings:
        raise EngineFailure("nobody scrapes a benchmark")

    return WorkerMetrics(CollectorRegistry(), model=model, role=role, read=read)


def listen_to(connection: Connection, take: Callable[[Any], None], ended: Callable[[], None]) -> None:
    """Calls `take` with what comes over the pipe, on the running loop."""
    loop = asyncio.get_running_loop()

    def readable() -> None:
        try:
            while connection.poll():
                take(connection.recv())
        except (EOFError, OSError):
            loop.remove_reader(connection.fileno())
            ended()

    loop.add_reader(connection.fileno(), readable)


def region_for(engine: Engine, memory: PoolMemory) -> tuple[BlockRegion, str]:
    kind = "shm" if engine.device_memory is None else "cuda_ipc"
    return region_of_pool(memory, engine.device_memory, engine.layout.block_bytes), kind


class _Decoding:
    def __init__(
        self,
        control: Connection,
        prefill: Connection | None,
        model: str,
        settings: Settings,
        limits: DecodeSettings,
        lane: Lane = nullcontext,
    ) -> None:
        self._control, self._prefill = control, prefill
        self._lane = lane
        self._model, self._settings, self._limits = model, settings, limits
        self._memory = PoolMemory(touch=True)
        self._sealed: dict[str, asyncio.Future[Sealed]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        notes: list[str] = []
        with self._lane():
            self._engine = engine = engine_of(self._model, self._settings, notes, memory=self._memory)
        self._scheduler = scheduler = DecodeScheduler(self._limits, engine.layout, engine.blocks, SystemClock())
        ahead = scheduler if overlaps("auto", engine.device.type, threads=1) else None
        core = Core(engine, scheduler, metrics_of(self._model, "decode"), SystemClock(), ahead=ahead)
        self._loop = EngineLoop[DecodeEvent](core, name="engine", inside=self._lane)
        over = asyncio.Event()
        self._loop.start(deliver=self._deliver, on_failure=lambda _: over.set())
        if self._prefill is not None:
            region, kind = region_for(engine, self._memory)
            self._receiver = KVReceiver(region, engine.layout, "d", 1, SECRET, SystemClock())
            offers = await self._receiver.start([kind], "127.0.0.1")
            self._prefill.send(Introduction(tuple(offers), region.num_blocks))
            listen_to(self._prefill, self._on_sealed, over.set)
        self._control.send(Ready(tuple(notes)))
        listen_to(self._control, lambda job: self._submit(job) if job is not None else over.set(), over.set)
        await over.wait()
        await self._loop.stop(STOP_S)
        if self._prefill is not None:
            await self._receiver.close()

    def _submit(self, job: Job) -> None:
        request = Request(job.name, "m", job.prompt, SamplingParams(job.max_tokens, seed=0, temperature=0.0), timeout_s=TTL_S)
        candidates = () if self._prefill is None else (WorkerRef("p", 1, ""),)
        self._loop.post(self._scheduler.submit, request, candidates)

    def _deliver(self, events: list[DecodeEvent]) -> None:
        at_s = time.monotonic()
        tokens: list[tuple[str, int]] = []
        ended: list[str] = []
        failed: list[str] = []
        for event in events:
            match event:
                case Output():
                    count = sum(len(chunk.token_ids) for chunk in event.chunks)
                    if count:
                        tokens.append((event.request_id, count))
                    if event.done:
                        ended.append(event.request_id)
                case Failed():
                    failed.append(event.request_id)
                case RemotePrefillWanted():
                    task = asyncio.get_running_loop().create_task(self._fetch(event))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        if tokens or ended or failed:
            self._control.send(News(at_s, tuple(tokens), tuple(ended), tuple(failed)))

    def _on_sealed(self, sealed: Sealed) -> None:
        self._sealed.pop(sealed.name).set_result(sealed)

    async def _fetch(self, wanted: RemotePrefillWanted) -> None:
        name = wanted.request.request_id
        incoming = self._receiver.open(
            request_id=name,
            attempt=wanted.attempt,
            prefill=wanted.prefill,
            first_block=wanted.first_block,
            blocks=wanted.blocks,
            num_tokens=wanted.request.num_prompt_tokens,
            ttl_s=TTL_S,
        )
        answer = self._sealed[name] = asyncio.get_running_loop().create_future()
        if self._prefill is not None:
            self._prefill.send(Order(wanted.request, incoming.ticket))
        try:
            sealed = await answer
            await incoming.complete(Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, sealed.digests))
        except PdserveError as error:
            self._loop.post(self._scheduler.remote_failed, name, error)
            return
        ready = RemotePrefill(sealed.first_tokens, (), sealed.cached_tokens, StageTimings(prefill_worker="p"))
        self._loop.post(self._scheduler.remote_ready, name, ready)


async def _prefill(
    control: Connection, decode: Connection, model: str, settings: Settings, limits: PrefillSettings, lane: Lane
) -> None:
    notes: list[str] = []
    memory = PoolMemory(touch=True)
    with lane():
        engine = engine_of(model, settings, notes, memory=memory)
    region, _ = region_for(engine, memory)
    sender = KVSender(region, engine.layout, "p", 1, SECRET, SystemClock())
    scheduler = PrefillScheduler(limits, engine.layout, engine.blocks, SystemClock())
    core = Core(engine, scheduler, metrics_of(model, "prefill"), SystemClock(), watcher=scheduler, layer_groups=LAYER_GROUPS)
    loop = EngineLoop[PrefillEvent](core, name="engine", inside=lane)
    news: dict[str, asyncio.Queue[PrefillEvent]] = {}
    over = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    def deliver(events: list[PrefillEvent]) -> None:
        for event in events:
            news[event.request_id].put_nowait(event)

    async def run(order: Order) -> None:
        name = order.request.request_id
        queue = news[name] = asyncio.Queue()
        outgoing = sender.open(order.ticket)
        loop.post(scheduler.submit, order.request)
        push = _Push(outgoing, order.ticket, engine.layout)
        while True:
            event = await queue.get()
            if isinstance(event, LayersComputed):
                await push.computed(event)
            elif isinstance(event, PromptComputed):
                break
            else:
                raise event.error
        account = await outgoing.finish()
        loop.post(scheduler.release, name)
        del news[name]
        decode.send(Sealed(name, dict(account.digests), event.first_tokens, event.cached_tokens))

    def take(message: Introduction | Order) -> None:
        work = introduce(message) if isinstance(message, Introduction) else run(message)
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def introduce(message: Introduction) -> None:
        await sender.connect("d", 1, message.offers, message.num_blocks)
        control.send(Ready(tuple(notes)))

    loop.start(deliver=deliver, on_failure=lambda _: over.set())
    listen_to(decode, take, over.set)
    listen_to(control, lambda message: over.set(), over.set)
    await over.wait()
    await sender.close()
    await loop.stop(STOP_S)


class _Push:
    """As the prefill worker's hand-off does it: a block leaves when it is final."""

    def __init__(self, outgoing: Outgoing, ticket: Ticket, layout: KVLayout) -> None:
        self._outgoing = outgoing
        self._ticket = ticket
        self._layout = layout
        self._next = ticket.first_block

    async def computed(self, event: LayersComputed) -> None:
        count = num_blocks if event.num_tokens == self._ticket.num_tokens else num_full_blocks
        final = count(event.num_tokens, self._layout.block_tokens)
        if final > self._next:
            pairs = [(logical, event.blocks[logical]) for logical in range(self._next, final)]
            if event.end_layer == self._layout.num_layers:
                self._next = final
            await self._outgoing.push(pairs, (event.first_layer, event.end_layer))
