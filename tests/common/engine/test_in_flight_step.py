"""Steps launched behind each other against the same steps one by one: plain, exact, native, and packed for a device."""

from __future__ import annotations

import dataclasses
import random
import threading
from pathlib import Path

import pytest
import torch

from common.config import EngineConfig
from common.engine.attention import create_rows_attention
from common.engine.batch import ForwardResult, SampleSpec, ScheduledBatch, SequenceSlice, SliceResult
from common.engine.captured.buckets import make_buckets
from common.engine.captured.steps import DecodeSteps
from common.engine.engine import Engine, build_engine
from common.engine.in_flight_step import InFlightStep, placeholder_of, with_tokens_of
from common.engine.operations import RowDraws
from common.engine.runner import ModelRunner
from common.errors import EngineFailure
from common.types import SampledToken
from support.host_draws import HostDraws
from support.tiny_models import make_tiny_model

pytestmark = pytest.mark.long

MOST_TOKENS, NUM_BLOCKS_EACH = 96, 6
KINDS: list[dict[str, object]] = [{}, {"temperature": 0.9}, {}, {"logprobs": 2}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["torch", "exact", "native", "packed", "drawing"])
def engine(tiny: Path, request: pytest.FixtureRequest) -> Engine:
    exact = request.param == "exact"
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        kernels="native" if request.param == "native" else "torch",
        exact=exact,
        kv_pool_tokens=1024,
        max_model_tokens=MOST_TOKENS,
    )
    engine = build_engine(tiny, config, threads=1, model_digest="m", tokenizer_digest="t")
    if request.param in ("packed", "drawing"):
        return dataclasses.replace(engine, runner=packed(engine, HostDraws() if request.param == "drawing" else None))
    return engine


def packed(engine: Engine, draws: RowDraws | None) -> ModelRunner:
    """A runner whose steps of single tokens are launched as on a GPU: placeholders are looked up by the program."""
    attention = create_rows_attention("fast", engine.pool, engine.architecture.num_heads)
    buckets = make_buckets(4, NUM_BLOCKS_EACH, one_width=False)
    runner = engine.runner.without_steps()
    runner.steps = DecodeSteps(
        runner._model,
        engine.pool,
        attention,
        buckets,
        engine.pool.num_blocks - 1,
        vocab_size=engine.architecture.vocab_size,
        capture=False,
        draws=draws,
    )
    return runner


class Sequence:
    """A prompt in chunks, then its answer; knows what is under way."""

    def __init__(self, number: int, prompt: list[int], kind: dict[str, object]) -> None:
        self.tokens = prompt
        self.blocks = list(range(1 + NUM_BLOCKS_EACH * number, 1 + NUM_BLOCKS_EACH * (number + 1)))
        self.kind = kind
        self.in_kv = 0
        self.logprobs: list[float] = []

    def next_slice(self, most_tokens: int) -> SequenceSlice:
        new = self.tokens[self.in_kv : self.in_kv + most_tokens]
        at_end = self.in_kv + len(new) == len(self.tokens)
        spec = dataclasses.replace(SampleSpec(len(self.tokens), 7, 0, 0.0, 0, 1.0, 0.0, None), **self.kind)
        return SequenceSlice(new, self.in_kv, self.blocks[: -(-(self.in_kv + len(new)) // 16)], (spec,) if at_end else ())

    def launched(self, item: SequenceSlice, index: int) -> None:
        self.in_kv += len(item.token_ids)
        if item.samples:
            self.tokens.append(placeholder_of(index))

    def read(self, token: SampledToken) -> None:
        self.tokens[next(place for place, known in enumerate(self.tokens) if known < 0)] = token.token_id
        if token.logprob is not None:
            self.logprobs.append(token.logprob.logprob)


def answers(engine: Engine, *, ahead: bool, kinds: list[dict[str, object]]) -> list[tuple[list[int], list[float]]]:
    """Chance decides who takes part in a step, in which row, and how long chunks are: the same with `ahead` and without."""
    chance = random.Random(4)
    engine.pool.tensor[1:].fill_(float("nan"))  # nothing may be read that was not written
    vocab = engine.architecture.vocab_size
    running = [
        Sequence(number, [chance.randrange(vocab) for _ in range(length)], kind)
        for number, (length, kind) in enumerate(zip([3, 16, 31, 17], kinds, strict=True))
    ]
    unread: list[tuple[list[tuple[Sequence, bool]], InFlightStep]] = []
    before: list[Sequence] = []

    def read_oldest() -> None:
        batch, step = unread.pop(0)
        for (item, samples), drawn in zip(batch, step.collect().slices, strict=True):
            if samples:
                item.read(drawn.tokens[0])

    for _ in range(30):
        # Whoever's token is under way has to go on behind it: nobody knows the token otherwise.
        rest = [item for item in running if item not in before]
        batch = [*before, *chance.sample(rest, chance.randrange(len(rest) + 1))] or running[:1]
        chance.shuffle(batch)
        slices = [item.next_slice(chance.choice([1, 7, 40])) for item in batch]
        unread.append(
            (
                [(item, bool(piece.samples)) for item, piece in zip(batch, slices, strict=True)],
                engine.runner.launch(ScheduledBatch(tuple(slices))),
            )
        )
        for index, (item, piece) in enumerate(zip(batch, slices, strict=True)):
            item.launched(piece, index)
        before = [item for item, piece in zip(batch, slices, strict=True) if piece.samples]
        while len(unread) > int(ahead):
            read_oldest()
    while unread:
        read_oldest()
    return [(item.tokens, item.logprobs) for item in running]


@pytest.mark.parametrize("kinds", [KINDS, [{}] * 4], ids=["mixed", "greedy"])
def test_what_is_launched_ahead_is_what_comes_one_by_one(engine: Engine, kinds: list[dict[str, object]]) -> None:
    one_by_one, launched_ahead = answers(engine, ahead=False, kinds=kinds), answers(engine, ahead=True, kinds=kinds)
    assert launched_ahead == one_by_one
    assert all(min(tokens) >= 0 for tokens, _ in one_by_one)
    assert len({tuple(tokens[-8:]) for tokens, _ in one_by_one}) > 1


@pytest.mark.parametrize("over", [False, True])
def test_execute_waits_its_turn(engine: Engine, over: bool) -> None:
    first = Sequence(0, [5, 6, 7], {})
    piece = first.next_slice(40)
    expected = engine.runner.execute(ScheduledBatch((piece,))).slices[0].tokens[0]
    first.launched(piece, 0)
    step = engine.runner.launch(ScheduledBatch((piece,)))
    if over:
        step.collect()
    following = engine.runner.execute(ScheduledBatch((first.next_slice(1),)))
    assert step.collect().slices[0].tokens == (expected,)
    assert step.collect() is step.collect()
    first.read(expected)
    first.in_kv = 3
    assert engine.runner.execute(ScheduledBatch((first.next_slice(1),))) == following


def test_a_step_that_fails_takes_the_ones_behind_it_along(engine: Engine) -> None:
    item = Sequence(0, [5, 6, 7], {})
    engine.runner.execute(ScheduledBatch((item.next_slice(40),)))
    engine.pool.tensor[1] = float("nan")
    item.in_kv = 2
    broken = engine.runner.launch(ScheduledBatch((item.next_slice(40),)))
    item.launched(item.next_slice(40), 0)
    behind = engine.runner.launch(ScheduledBatch((item.next_slice(40),)))
    for step in (broken, behind, broken):
        step.settle()
        with pytest.raises(EngineFailure, match="not finite"):
            step.collect()
    engine.pool.tensor.zero_()


def test_layers_are_told_to_who_collects(engine: Engine) -> None:
    told: list[tuple[int, int]] = []
    item = Sequence(0, [5, 6, 7], {})
    step = engine.runner.launch(ScheduledBatch((item.next_slice(40),)), lambda count: told.append((count, threading.get_ident())))
    step.settle()
    assert not told
    step.collect()
    step.collect()
    here = threading.get_ident()
    assert told == [(count + 1, here) for count in range(engine.layout.num_layers)]


def test_blocks_are_copied_behind_what_was_launched(engine: Engine) -> None:
    item = Sequence(0, list(range(10, 26)), {})
    step = engine.runner.launch(ScheduledBatch((item.next_slice(40),)))
    engine.runner.copy_block(item.blocks[0], 20)
    step.collect()
    assert torch.equal(engine.pool.tensor[20], engine.pool.tensor[item.blocks[0]])


def test_an_answer_that_could_not_be_drawn_leaves_some_token() -> None:
    batch = ScheduledBatch((SequenceSlice([placeholder_of(1)], 4, [1]), SequenceSlice([placeholder_of(0)], 3, [2])))
    before = ForwardResult((SliceResult((SampledToken(9),)), SliceResult(error=EngineFailure("none"))))
    assert [item.token_ids for item in with_tokens_of(batch, before).slices] == [[0], [9]]
