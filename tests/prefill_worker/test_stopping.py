"""A step that nobody wants any more ends between two layers, and what comes behind it is what it would have been without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from common.clock import SystemClock
from common.config import EngineConfig, PrefillConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.core import Core
from common.engine.engine import Engine, build_engine
from common.errors import EngineFailure
from common.metrics import WorkerMetrics, WorkerReadings
from common.types import Request, SamplingParams
from prefill_worker.scheduler import Event, LayersComputed, PrefillScheduler, PromptComputed
from support.tiny_models import make_tiny_model

CHUNK_TOKENS = 16
SAMPLING = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3, seed=0)
LONG = Request("long", "m", tuple(range(3, 3 + 4 * CHUNK_TOKENS)), SAMPLING)
SHORT = Request("short", "m", tuple(range(200, 221)), SAMPLING)


def _nobody_reads() -> WorkerReadings:
    raise EngineFailure("nobody reads the metrics of a test")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def built(path: Path, kernels: str) -> Engine:
    settings = EngineConfig(device="cpu", dtype="float32", kv_pool_tokens=512, block_tokens=4, kernels=kernels)
    return build_engine(path, settings, threads=1, model_digest="m", tokenizer_digest="t")


@pytest.fixture(params=["torch", "native"])
def engine(tiny: Path, request: pytest.FixtureRequest) -> Engine:
    return built(tiny, request.param)


class Prefilling:
    """A worker's core, driven by hand."""

    def __init__(self, engine: Engine, **limits: object) -> None:
        config = PrefillConfig(chunk_tokens=CHUNK_TOKENS, **limits)  # type: ignore[arg-type]
        self.scheduler = PrefillScheduler(config, engine.layout, engine.blocks, SystemClock())
        self.events: list[Event] = []
        metrics = WorkerMetrics(CollectorRegistry(), model="m", role="prefill", read=_nobody_reads)
        self._core = Core(
            engine, self.scheduler, metrics, SystemClock(), watcher=self.scheduler, layer_groups=engine.layout.num_layers
        )

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """`meanwhile` happens whenever a layer is through."""
        assert self._core.schedule()

        def hand_over() -> None:
            self.events += self._core.take_events()
            meanwhile()

        self._core.compute(hand_over)
        self.events += self._core.take_events()

    def first_tokens(self, name: str) -> object:
        for _ in range(20):
            computed = [event for event in self.events if isinstance(event, PromptComputed) and event.request_id == name]
            if computed:
                return computed[0].first_tokens
            self.step()
        raise AssertionError(f"{name} is not computed")

    def layers_of(self, name: str) -> list[int]:
        """Where the groups of layers ended that were reported of it."""
        return [event.end_layer for event in self.events if isinstance(event, LayersComputed) and event.request_id == name]


def test_a_step_that_nobody_wants_ends_between_two_layers(tiny: Path, engine: Engine, request: pytest.FixtureRequest) -> None:
    assert engine.layout.num_layers > 1
    prefilling, free_blocks = Prefilling(engine, max_running=1), engine.blocks.num_available
    scheduler = prefilling.scheduler
    scheduler.submit(LONG)
    prefilling.step()
    scheduler.submit(SHORT)
    prefilling.step(lambda: scheduler.give_up("long"))
    of_long = [*range(1, engine.layout.num_layers + 1), 1]
    assert prefilling.layers_of("long") == of_long
    assert scheduler.totals.computed_tokens == CHUNK_TOKENS
    scheduler.stop("long")  # as the worker posts it
    scheduler.release("long")
    tokens = prefilling.first_tokens("short")
    assert prefilling.layers_of("long") == of_long
    scheduler.release("short")
    assert scheduler.is_idle
    engine.blocks.check_integrity()
    assert engine.blocks.num_available == free_blocks
    untouched = Prefilling(built(tiny, request.node.callspec.params["engine"]), max_running=1)
    untouched.scheduler.submit(SHORT)
    assert untouched.first_tokens("short") == tokens


def test_a_step_that_somebody_wants_goes_on(engine: Engine) -> None:
    prefilling = Prefilling(engine, step_tokens=4 * CHUNK_TOKENS)
    scheduler = prefilling.scheduler
    scheduler.submit(LONG)
    scheduler.submit(SHORT)
    prefilling.step(lambda: scheduler.give_up("long"))
    every_layer = list(range(1, engine.layout.num_layers + 1))
    assert prefilling.layers_of("long") == prefilling.layers_of("short") == every_layer
    for name in ("long", "short"):
        scheduler.release(name)
    assert scheduler.is_idle
    engine.blocks.check_integrity()


def test_a_step_that_another_thread_may_compute_is_not_stopped(engine: Engine) -> None:
    blocks = engine.blocks.allocate(1)
    assert engine.runner.can_stop
    engine.runner.launch(ScheduledBatch((SequenceSlice([5, 6, 7], 0, blocks),))).collect()
    engine.blocks.release(blocks)
    assert not engine.runner.can_stop
    prefilling = Prefilling(engine)
    prefilling.scheduler.submit(LONG)
    prefilling.step(lambda: prefilling.scheduler.give_up("long"))
    assert prefilling.layers_of("long") == list(range(1, engine.layout.num_layers + 1))
    prefilling.scheduler.release("long")
