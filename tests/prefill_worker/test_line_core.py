"""Prompts in a pipeline that stays full: the next chunk, or the next prompt, enters while later stages have the one before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from common.clock import SystemClock
from common.config import PrefillConfig
from common.engine.core import Core
from common.engine.engine import Engine
from common.engine.line_core import LineCore
from common.errors import EngineFailure
from common.metrics import WorkerMetrics, WorkerReadings
from common.types import Request, SampledToken, SamplingParams
from prefill_worker.scheduler import Event, LayersComputed, PrefillScheduler, PromptComputed
from support.ranks import ThreadRanks
from support.stages import Records, built
from support.tiny_models import make_tiny_model

CHUNK_TOKENS = 3
LENGTHS = {"a": 20, "b": 2, "c": 13, "d": 7}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), layers=4)


def request(name: str, **sampling: object) -> Request:
    values = {"max_tokens": 4, "temperature": 0.0, "logprobs": 2, "seed": 0, **sampling}
    prompt = tuple(3 + (7 * place + 31 * ord(name)) % 300 for place in range(LENGTHS[name]))
    return Request(name, "m", prompt, SamplingParams(**values))  # type: ignore[arg-type]


def _nobody_reads() -> WorkerReadings:
    raise EngineFailure("nobody reads the metrics of a test")


class Prefilling:
    """A worker's core, driven by hand; what it tells of layers is held against what is in the ranks' pools."""

    def __init__(self, engine: Engine) -> None:
        config = PrefillConfig(chunk_tokens=CHUNK_TOKENS)
        self.engine = engine
        self.scheduler = PrefillScheduler(config, engine.layout, engine.blocks, SystemClock())
        self.events: list[Event] = []
        self.told: list[tuple[LayersComputed, list[torch.Tensor]]] = []
        metrics = WorkerMetrics(CollectorRegistry(), model="m", role="prefill", read=_nobody_reads)
        kind = Core if engine.degree == (1, 1) else LineCore
        self.core = kind(
            engine, self.scheduler, metrics, SystemClock(), watcher=self.scheduler, layer_groups=engine.layout.num_layers
        )

    def step(self) -> bool:
        if not self.core.schedule():
            return False
        self.core.compute(self._take)
        self._take()
        return True

    def _take(self) -> None:
        for event in self.core.take_events():
            self.events.append(event)
            if isinstance(event, LayersComputed):
                self.told.append((event, self.content(event)))

    def content(self, event: LayersComputed) -> list[torch.Tensor]:
        """Keys and values of the tokens and layers that an event is about, as they are now."""
        group = self.engine.group
        shares = group.shares if isinstance(group, ThreadRanks) else []
        found = []
        for layer, position in itertools.product(range(event.first_layer, event.end_layer), range(event.num_tokens)):
            block, offset = event.blocks[position // 4], position % 4
            for share in shares:
                if layer in share.share.layers:
                    found.append(share.pool.tensor[block, layer - share.share.layers.start, :, :, offset].clone())
        return found

    def first_tokens(self) -> dict[str, Sequence[SampledToken]]:
        return {event.request_id: event.first_tokens for event in self.events if isinstance(event, PromptComputed)}

    def layers_of(self, name: str) -> list[tuple[int, int]]:
        return [
            (event.num_tokens, event.end_layer)
            for event in self.events
            if isinstance(event, LayersComputed) and event.request_id == name
        ]


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[str, Sequence[SampledToken]]:
    """In one process."""
    with built(tiny, 1, 1, num_blocks=40) as engine:
        prefilling = Prefilling(engine)
        for name in LENGTHS:
            prefilling.scheduler.submit(request(name))
        while prefilling.step():
            pass
        return prefilling.first_tokens()


def every_chunk_and_layer(name: str) -> list[tuple[int, int]]:
    ends = [*range(CHUNK_TOKENS, LENGTHS[name], CHUNK_TOKENS), LENGTHS[name]]
    return [(end, layer) for end in ends for layer in (1, 2, 3, 4)]


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (1, 4), (2, 2)])
def test_prompts_are_computed_as_in_one_process(
    tiny: Path, expected: dict[str, Sequence[SampledToken]], tensor: int, pipeline: int
) -> None:
    with built(tiny, tensor, pipeline, num_blocks=40) as engine:
        prefilling = Prefilling(engine)
        for name in LENGTHS:
            prefilling.scheduler.submit(request(name))
        while prefilling.step():
            pass
        found = prefilling.first_tokens()
        if tensor == 1:
            assert found == expected
        assert {name: [token.token_id for token in tokens] for name, tokens in found.items()} == {
            name: [token.token_id for token in tokens] for name, tokens in expected.items()
        }
        for name in LENGTHS:
            assert prefilling.layers_of(name) == every_chunk_and_layer(name)
        assert prefilling.told
        for event, content in prefilling.told:  # what was told of as stored was there then, and is what is there in the end
            assert content
            assert all(torch.equal(one, other) for one, other in zip(content, prefilling.content(event), strict=True))
        for name in LENGTHS:
            prefilling.scheduler.release(name)
        assert prefilling.scheduler.is_idle
        assert engine.blocks.num_used == 0


def test_chunks_enter_while_the_last_stage_has_the_one_before(tiny: Path) -> None:
    """The last stage may not end a chunk before the first stage has begun the next one, of this prompt or of another."""
    with built(tiny, 1, 2, num_blocks=40) as engine:
        records, prefilling = Records(engine), Prefilling(engine)
        prefilling.scheduler.submit(request("a"))
        starts = range(0, LENGTHS["a"], CHUNK_TOKENS)
        for start, following in itertools.pairwise(starts):
            records.held[1, (start,)] = (0, (following,))
        while prefilling.step():
            pass
        for start, following in itertools.pairwise(starts):
            assert records.place(0, (following,), ended=False) < records.place(1, (start,), ended=True)
        assert prefilling.layers_of("a") == every_chunk_and_layer("a")


def test_who_comes_while_a_step_is_under_way_is_in_the_next_one(tiny: Path) -> None:
    """It is planned when the first stage is free, not before."""
    with built(tiny, 1, 2, num_blocks=40) as engine:
        prefilling = Prefilling(engine)
        prefilling.scheduler.submit(request("a"))
        prefilling.step()
        prefilling.scheduler.submit(request("b"))  # shorter: it goes first
        prefilling.step()
        prefilling.step()
        assert list(prefilling.first_tokens()) == ["b"]


def test_what_is_given_up_while_it_is_under_way_leaves_nothing(tiny: Path, expected: dict[str, Sequence[SampledToken]]) -> None:
    with built(tiny, 1, 2, num_blocks=40) as engine:
        prefilling = Prefilling(engine)
        for name in LENGTHS:
            prefilling.scheduler.submit(request(name))
        prefilling.step()
        prefilling.step()
        prefilling.scheduler.release("a")
        prefilling.scheduler.release("c")
        while prefilling.step():
            pass
        assert prefilling.first_tokens() == {name: tokens for name, tokens in expected.items() if name in "bd"}
        prefilling.scheduler.release("b")
        prefilling.scheduler.release("d")
        assert prefilling.scheduler.is_idle
        assert engine.blocks.num_used == 0
        engine.blocks.check_integrity()


def test_the_step_under_way_is_over_when_the_core_has_finished(tiny: Path) -> None:
    with built(tiny, 1, 2, num_blocks=40) as engine:
        prefilling = Prefilling(engine)
        prefilling.scheduler.submit(request("b"))
        prefilling.step()
        prefilling.core.finish()
        prefilling._take()
        assert list(prefilling.first_tokens()) == ["b"]
        assert not prefilling.core.schedule()
