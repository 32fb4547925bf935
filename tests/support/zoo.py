"""What `tests/zoo` shares: an oracle, workers that come and go, ways to hold an engine still, an audit of caches."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from common.config import DecodeConfig, EngineConfig, TransferConfig
from common.errors import PdserveError
from common.rpc import connect
from common.types import Request, Role, WorkerRef
from decode_worker.server import DecodeWorker
from prefill_worker.server import PrefillWorker
from support.workers import TOKEN, Answer, Workers, transfer_over

BLOCK = 16
ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=2048)
UNCACHED = ENGINE.model_copy(update={"prefix_cache": False})
REMOTE = DecodeConfig(local_prefill="never")
AUTO = DecodeConfig(local_prefill="auto", local_prefill_tokens=0)
PATIENCE_S = 120.0  # far beyond what anything here takes: a hang becomes a failure


def for_ever(*transports: str) -> TransferConfig:
    """Nothing runs out by itself: what comes back within a test came back because somebody was told."""
    return transfer_over(*(transports or ("shm", "tcp")), lease_s=300.0, ticket_ttl_s=300.0)


def prompt_of(length: int, number: int = 0) -> list[int]:
    chance = random.Random(10_000 * number + length)
    return [chance.randrange(3, 380) for _ in range(length)]


class Oracle:
    """What transformers, which shares no code with ours, says greedily."""

    def __init__(self, model_path: Path) -> None:
        self._model = transformers.LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def tokens(self, request: Request) -> list[int]:
        prompt, count = request.prompt_token_ids, request.sampling.max_tokens
        if (prompt, count) not in self._known:
            said = self._model.generate(
                torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            self._known[prompt, count] = said[0, len(prompt) :].tolist()
        return self._known[prompt, count]

    def agrees(self, request: Request, answer: Answer) -> bool:
        expected = self.tokens(request)
        return all(tokens == expected for tokens in answer.token_ids.values()) and len(answer.finish) == request.num_choices


async def until(condition: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    """Polls what has no event of its own."""
    deadline_s = asyncio.get_running_loop().time() + patience_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s, f"it never came to pass: {what}"
        await asyncio.sleep(0.001)


async def within(awaitable: Any) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


async def is_free(workers: Workers, ref: WorkerRef) -> bool:
    info = await workers.info(ref.address)
    idle = (info.leases_open, info.blocks_in_transfer, info.requests_running, info.requests_waiting) == (0, 0, 0, 0)
    return idle and info.blocks_free == info.blocks_total


async def until_free(workers: Workers, ref: WorkerRef, patience_s: float = 5.0) -> None:
    deadline_s = asyncio.get_running_loop().time() + patience_s
    while not await is_free(workers, ref):
        info = await workers.info(ref.address)
        assert asyncio.get_running_loop().time() < deadline_s, f"{ref.worker_id} still holds something: {info}"
        await asyncio.sleep(0.005)


async def assert_no_ghosts(workers: Workers) -> None:
    """Before long nothing that a request ever put anywhere is left, on either side."""

    def left() -> list[str]:
        scheduler = workers.decode._scheduler
        places = {
            "generations": scheduler._generations,
            "waiting": scheduler._waiting,
            "remote": scheduler._remote,
            "running": scheduler._running,
            "streams": workers.decode._streams._streams,
            "hand-offs": workers.decode._handoff._background,
        }
        for index, worker in enumerate(workers.prefill):
            prompts = worker._scheduler
            places |= {
                f"prompts {index}": prompts._prompts,
                f"waiting {index}": prompts._waiting,
                f"running {index}": prompts._running,
                f"runs {index}": worker._runs._news,
            }
        return [name for name, found in places.items() if found]

    await until(lambda: not left(), "no ghosts")


# -- workers that come and go ------------------------------------------------------------------------------------------


@asynccontextmanager
async def another_prefill(workers: Workers, **changes: Any) -> AsyncIterator[tuple[PrefillWorker, WorkerRef]]:
    """One more prefill worker, like the first but for the changes to its `WorkerSpec`."""
    worker = PrefillWorker(replace(workers.prefill[0]._spec, **changes))
    ref = await worker.start()
    try:
        yield worker, ref
    finally:
        await worker.stop(0.0)


@asynccontextmanager
async def another_decode(workers: Workers, worker_id: str, incarnation: int = 1) -> AsyncIterator[Workers]:
    """One more decode worker in front of the same prefill workers."""
    worker = DecodeWorker(replace(workers.decode._spec, worker_id=worker_id, incarnation=incarnation, role=Role.DECODE))
    ref = await worker.start()
    channel = connect(ref.address, TOKEN)
    try:
        yield Workers(worker, workers.prefill, ref, workers.prefill_refs, channel)
    finally:
        await channel.close(None)
        await worker.stop(0.0)


# -- engines that stand still ------------------------------------------------------------------------------------------


class Stall:
    """An engine that computes a few more steps and then no more, though it still hears what is posted; until `release`."""

    def __init__(self, worker: PrefillWorker | DecodeWorker, after_steps: int) -> None:
        core: Any = worker._loop._core
        self.steps_left: float = after_steps
        self._loop = worker._loop
        self._schedule = core.schedule
        core.schedule = self._scheduled

    @property
    def stalled(self) -> bool:
        return self.steps_left <= 0

    def release(self, steps: float = float("inf")) -> None:
        """It computes so many steps more."""
        self.steps_left = steps
        self._loop.post(lambda: None)

    def _scheduled(self) -> bool:
        if self.stalled or not self._schedule():
            return False
        self.steps_left -= 1
        return True


class Held:
    """An engine whose thread stands still between two steps; it hears nothing either, until `release`."""

    def __init__(self, worker: PrefillWorker | DecodeWorker) -> None:
        self._gate = threading.Event()
        self._inbox = worker._loop._inbox
        self.holding = False
        worker._loop.post(self._wait)

    def _wait(self) -> None:
        self.holding = True
        self._gate.wait(PATIENCE_S)

    def has_mail(self, count: int = 1) -> bool:
        """It stands still, and so many calls wait for it."""
        return self.holding and self._inbox.qsize() >= count

    def release(self) -> None:
        self._gate.set()


# -- what a stream said, to the end ------------------------------------------------------------------------------------


async def ending(workers: Workers, request: Request, prefill: Sequence[WorkerRef] | None = None) -> Answer | PdserveError:
    """The answer, or the typed error; anything else is raised."""
    try:
        return await within(workers.generate(request, prefill=prefill))
    except PdserveError as error:
        return error


# -- caches ------------------------------------------------------------------------------------------------------------


def cached_content(worker: PrefillWorker | DecodeWorker) -> dict[bytes, bytes]:
    """Name of each findable block -> what is in it. Only while nothing runs."""
    engine = worker._host.engine
    size = engine.layout.block_bytes
    return {name: bytes(engine.pool.buffer[block * size : (block + 1) * size]) for name, block in engine.blocks._block_of.items()}


async def audit_cache(workers: Workers, honest: Workers, prompts: Sequence[Request]) -> None:
    """Every block that can be found on the decode side has the bytes that a worker alone computes for that name: in exact mode
    they are the same to the last bit. `honest` prefills locally and has been given nothing else."""
    for item in prompts:
        await honest.generate(item)
    known = cached_content(honest.decode)
    found = cached_content(workers.decode)
    assert set(found) <= set(known), "a block is findable that nobody should have computed"
    wrong = [name.hex()[:8] for name, content in found.items() if known[name] != content]
    assert not wrong, f"cached blocks hold something else than their name says: {wrong}"
