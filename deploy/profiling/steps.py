"""Runs the steps that a decode worker would run, one after the other on this thread, and has them timed stage by stage.

    decode   so many sequences of so many tokens each, all of them generating: one token each per step
    prompt   one prompt, computed in one step

The scheduler, the runner and the engine are those of a worker. What comes after the engine's thread (events on the wire,
detokenising) is timed beside the steps, for it is done elsewhere while the next step computes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.clock import SystemClock
from common.codec import chunk_to_wire
from common.config import DecodeConfig, EngineConfig
from common.engine.engine import Engine, build_engine
from common.engine.profile.stopwatch import Stopwatch
from common.engine.profile.watched import Limits, StepProfile, WatchedEngine
from common.errors import ConfigError, EngineFailure
from common.tokenizer import Tokenizer
from common.types import Request, SamplingParams, TokenChunk
from decode_worker.events import Output
from decode_worker.scheduler import DecodeScheduler

_WARM_STEPS = 3
_PROMPT_RUNS = 3
_ROOM_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    batch: int
    context: int
    prompt: int
    steps: int


@dataclass(frozen=True, slots=True)
class Profiles:
    kernels: str
    dtype: str
    limits: Limits
    decode: StepProfile | None
    prompt: StepProfile | None
    beside: dict[str, float]  # seconds per decode step, in other threads and processes


def profile_steps(
    path: Path, settings: EngineConfig, wanted: Wanted, *, threads: int, say: Callable[[str], None] = lambda _: None
) -> Profiles:
    """Blocking, for seconds. Raises PdserveError."""
    tokenizer = Tokenizer.load(path)
    engine = _engine(path, settings, wanted, threads, say)
    watched = WatchedEngine(engine)
    limits = watched.limits()
    runs = _Runs(watched, wanted, tokenizer)
    prompt = runs.prompt(limits) if wanted.prompt else None
    decode = runs.decode(limits) if wanted.batch else None
    name = "native" if watched.is_native else "torch"
    return Profiles(name, engine.layout.dtype, limits, decode, prompt, runs.beside)


def _engine(path: Path, settings: EngineConfig, wanted: Wanted, threads: int, say: Callable[[str], None]) -> Engine:
    tokens = wanted.batch * (wanted.context + wanted.steps + _ROOM_TOKENS) + wanted.prompt + _ROOM_TOKENS
    changes = {"kv_pool_tokens": max(tokens, settings.kv_pool_tokens), "prefix_cache": False}

    def build(kernels: str) -> Engine:
        config = settings.model_copy(update=changes | {"kernels": kernels})
        return build_engine(path, config, threads=threads, model_digest="", tokenizer_digest="", announce=say)

    if settings.kernels != "auto":
        return build(settings.kernels)
    try:
        return build("native")  # now: what takes over later would be timed in part only
    except ConfigError as error:
        say(f"{error.message}; torch is profiled")
        return build("auto" if settings.device != "cpu" else "torch")


class _Runs:
    def __init__(self, watched: WatchedEngine, wanted: Wanted, tokenizer: Tokenizer) -> None:
        self._watched = watched
        self._engine = watched.engine
        self._wanted = wanted
        self._tokenizer = tokenizer
        self._draw = random.Random(0)
        self._latest = (0, 0)  # sequences and tokens of the last step
        self.beside: dict[str, float] = {}
        limits = DecodeConfig(
            local_prefill="always", step_tokens=max(512, wanted.prompt), max_running=max(1, wanted.batch), watermark_blocks=0
        )
        scheduler = DecodeScheduler(limits, self._engine.layout, self._engine.blocks, SystemClock())
        self._scheduler = watched.stopwatch.around(scheduler, schedule="scheduler", complete="account", take_events="events")

    def prompt(self, limits: Limits) -> StepProfile:
        """The step that computes a whole prompt and draws its first token."""
        seconds = 0.0
        self._submit("warm", self._wanted.prompt, 1)
        self._run_all()
        self._watched.begin()
        for run in range(_PROMPT_RUNS):
            self._submit(f"prompt {run}", self._wanted.prompt, 1)
            started_s = time.perf_counter()
            self._step()
            seconds += time.perf_counter() - started_s
        return self._watched.take(seconds, limits)

    def decode(self, limits: Limits) -> StepProfile:
        wanted = self._wanted
        for index in range(wanted.batch):
            self._submit(f"decode {index}", wanted.context, wanted.steps + wanted.batch + _WARM_STEPS + 2)
        while self._scheduler.num_waiting or not self._all_decode():
            self._step()
        for _ in range(_WARM_STEPS):
            self._step()
        seconds, chunks = 0.0, []
        self._watched.begin()
        for _ in range(wanted.steps):
            started_s = time.perf_counter()
            chunks.append(self._step())
            seconds += time.perf_counter() - started_s
        found = self._watched.take(seconds, limits)
        self.beside = _beside(chunks, self._tokenizer)
        self._run_all()
        return found

    def _submit(self, name: str, prompt_tokens: int, max_tokens: int) -> None:
        vocab_size = self._engine.architecture.vocab_size
        prompt = tuple(self._draw.randrange(vocab_size) for _ in range(prompt_tokens))
        self._scheduler.submit(Request(name, "", prompt, SamplingParams(max_tokens, seed=0, temperature=0.0)), ())

    def _all_decode(self) -> bool:
        """Whether the last step was one token of every sequence."""
        return self._latest == (self._wanted.batch, self._wanted.batch)

    def _step(self) -> list[TokenChunk]:
        plan = self._scheduler.schedule()
        for source, destination in plan.copies:
            self._engine.runner.copy_block(source, destination)
        if not plan.batch.slices:
            raise EngineFailure("there is nothing to compute")
        self._scheduler.complete(plan, self._engine.runner.execute(plan.batch))
        events = self._scheduler.take_events()
        self._watched.step_done(plan.batch)
        self._latest = (len(plan.batch.slices), plan.batch.num_tokens)
        return [chunk for event in events if isinstance(event, Output) for chunk in event.chunks]

    def _run_all(self) -> None:
        while self._scheduler.num_waiting or self._scheduler.num_running:
            self._step()


def _beside(steps: list[list[TokenChunk]], tokenizer: Tokenizer) -> dict[str, float]:
    """What a step's tokens cost behind the engine's thread: as messages, and as text."""
    stopwatch = Stopwatch()
    to_wire = stopwatch.timed("on the wire", lambda chunk: chunk_to_wire(chunk).SerializeToString())
    stream = tokenizer.stream()
    to_text = stopwatch.timed("detokenise", stream.push)
    for chunk in _all(steps):
        to_wire(chunk)
        for token_id in chunk.token_ids:
            to_text(token_id)
    return {stage: seconds / len(steps) for stage, seconds in stopwatch.seconds.items()}


def _all(steps: list[list[TokenChunk]]) -> Iterator[TokenChunk]:
    for chunks in steps:
        yield from chunks
