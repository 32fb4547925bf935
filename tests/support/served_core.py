"""A decode worker's core on its thread, without a worker around it: requests in, answers out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from common.clock import SystemClock
from common.config import DecodeConfig
from common.engine.core import Core
from common.engine.engine import Engine
from common.engine.loop import EngineLoop
from common.errors import EngineFailure
from common.metrics import WorkerMetrics, WorkerReadings
from common.types import Request, SamplingParams
from decode_worker.events import Event, Failed, Output
from decode_worker.scheduler import DecodeScheduler
from decode_worker.swapper import create_swapper

Answer = list[tuple[int, float]]


def request(name: str, length: int, **sampling: object) -> Request:
    values = {"max_tokens": 12, "seed": 5, "temperature": 0.0, "logprobs": 0, **sampling}
    prompt = tuple(3 + (7 * place + 31 * len(name) + ord(name[-1])) % 300 for place in range(length))
    return Request(name, "m", prompt, SamplingParams(**values))  # type: ignore[arg-type]


PLAIN_WORK = [
    request("a", 9),
    request("b", 5, temperature=0.9),
    request("c", 13, temperature=1.0, top_k=20),
    request("d", 3, min_tokens=4, stop_token_ids=(2,)),
    request("e", 17),
]


class Served:
    def __init__(self, engine: Engine, *, overlap: bool, preemption: str = "recompute") -> None:
        config = DecodeConfig(
            local_prefill="always", watermark_blocks=0, growth_tokens=0, step_tokens=16, preemption=preemption, swap_bytes=1 << 20
        )
        swapper = create_swapper(config, engine)
        self.scheduler = DecodeScheduler(
            config, engine.layout, engine.blocks, SystemClock(), None, None if swapper is None else swapper.swapping
        )
        core = Core(
            engine,
            self.scheduler,
            WorkerMetrics(CollectorRegistry(), model="m", role="decode", read=_nobody_reads),
            SystemClock(),
            before_step=None if swapper is None else swapper.move,
            ahead=self.scheduler if overlap else None,
        )
        self.loop = EngineLoop[Event](core, name="engine")
        self.answers: dict[str, Answer] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._news = asyncio.Event()

    async def run(self, work: Sequence[Request], *, abort: Sequence[str] = ()) -> dict[str, Answer]:
        """Those that are aborted are so when they have said something."""
        self._ended = {item.request_id: asyncio.Event() for item in work}
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.loop.start(deliver=self._deliver, on_failure=failed.set_exception)
        for item in work:
            self.loop.post(self.scheduler.submit, item, ())
        try:
            async with asyncio.timeout(60.0):
                for name in abort:
                    while not self.answers.get(name):
                        self._news.clear()
                        await self._news.wait()
                    self.loop.post(self.scheduler.abort, name)
                for item in work:
                    if item.request_id not in abort:
                        await self._ended[item.request_id].wait()
        finally:
            await self.loop.stop()
        assert not failed.done()
        return {name: answer for name, answer in self.answers.items() if name not in abort}

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            assert not isinstance(event, Failed)
            if isinstance(event, Output):
                for chunk in event.chunks:
                    name = f"{event.request_id}.{chunk.choice}" if chunk.choice else event.request_id
                    answer = self.answers.setdefault(name, [])
                    reports = [report.logprob for report in chunk.logprobs] or [0.0] * len(chunk.token_ids)
                    answer.extend(zip(chunk.token_ids, reports, strict=True))
                if event.done:
                    self._ended[event.request_id].set()
        self._news.set()


def _nobody_reads() -> WorkerReadings:
    raise EngineFailure("nobody scrapes a test")


def one_by_one(engine: Engine, work: Sequence[Request]) -> dict[str, Answer]:
    """The answer of each by itself, step after step."""

    async def all_of_them() -> dict[str, Answer]:
        found: dict[str, Answer] = {}
        for item in work:
            found |= await Served(engine, overlap=False).run([item])
        return found

    return asyncio.run(all_of_them())
