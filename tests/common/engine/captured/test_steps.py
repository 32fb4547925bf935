"""Packed steps against the plain runner: the same requests, the same tokens. Programs run one operation after the other here."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from common.config import EngineConfig
from common.engine.attention import create_rows_attention
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.captured.buckets import make_buckets
from common.engine.captured.drawing import OnHost
from common.engine.captured.steps import DecodeSteps, PendingStep
from common.engine.engine import Engine, build_engine
from common.engine.runner import ModelRunner
from common.engine.token_rules import Bias, Penalties, RowRules
from common.errors import EngineFailure
from support.host_draws import HostDraws
from support.tiny_models import make_tiny_model

MOST_ROWS, MOST_TOKENS = 6, 96
BIAS = Bias(np.array([5, 9]), np.array([1.5, -2.0], dtype=np.float32))
PENALTIES = Penalties(np.arange(40, 60), np.arange(20, dtype=np.float32) % 3, 1.2, 0.3, 0.1)
DRAWN: list[dict[str, object]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9, "seed": 2**64 - 1},
    {"temperature": 0.9, "min_p": 0.02, "choice": 3},
    {"temperature": 1.3, "top_k": 7, "rules": RowRules(bias=BIAS, banned_token_ids=np.array([3, 100_000]))},
    {"rules": RowRules(penalties=PENALTIES)},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.8, "rules": RowRules(bias=BIAS, penalties=PENALTIES)},
]
KINDS: dict[str, list[dict[str, object]]] = {
    "all": [{}, {}, {"temperature": 0.9}, {}, {"logprobs": 2}, {"temperature": 1.0, "top_k": 5}],
    "greedy": [{}] * 6,
    "drawn": DRAWN,
    "unfiltered": [{}, {"temperature": 0.9}, {}, {"temperature": 2.0, "min_p": 0.01}, {}, {}],
}


@pytest.fixture(scope="module", params=["llama", pytest.param("random:toy-mixture", marks=pytest.mark.long)])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = make_tiny_model(tmp_path_factory.mktemp("model")) if request.param == "llama" else Path(request.param)
    config = EngineConfig(device="cpu", dtype="float32", kernels="torch", kv_pool_tokens=2048, max_model_tokens=MOST_TOKENS)
    return build_engine(path, config, threads=1, model_digest="m", tokenizer_digest="t")


@pytest.fixture(params=["drawn here", "drawn by steps"])
def packed(engine: Engine, request: pytest.FixtureRequest) -> ModelRunner:
    """A runner over the same model and pool whose decode steps are packed; they draw their tokens, or leave it to the runner."""
    scratch = engine.pool.num_blocks - 1
    rows_attention = create_rows_attention("fast", engine.pool, engine.architecture.num_heads)
    buckets = make_buckets(MOST_ROWS, MOST_TOKENS // 16, one_width=False)
    runner = engine.runner.without_steps()
    runner.steps = DecodeSteps(
        runner._model,
        engine.pool,
        rows_attention,
        buckets,
        scratch,
        vocab_size=engine.architecture.vocab_size,
        capture=False,
        draws=HostDraws() if request.param == "drawn by steps" else None,
    )
    return runner


def spec(position: int, **changes: object) -> SampleSpec:
    return dataclasses.replace(SampleSpec(position, 7, 0, 0.0, 0, 1.0, 0.0, None), **changes)


class Sequence:
    def __init__(self, prompt: list[int], first_block: int, **sampling: object) -> None:
        self.tokens = prompt
        self.blocks = list(range(first_block, first_block + MOST_TOKENS // 16))
        self.sampling = sampling
        self.in_kv = 0

    def slice(self) -> SequenceSlice:
        table = self.blocks[: -(-len(self.tokens) // 16)]
        return SequenceSlice(self.tokens[self.in_kv :], self.in_kv, table, (spec(len(self.tokens), **self.sampling),))


def sequences(vocab: int, seed: int) -> list[Sequence]:
    chance = random.Random(seed)
    lengths = [1, 15, 16, 17, 40, 31]
    return [
        Sequence([chance.randrange(vocab) for _ in range(length)], 1 + 6 * index, **kind)
        for index, (length, kind) in enumerate(zip(lengths, KINDS["all"], strict=True))
    ]


def generate(runner: ModelRunner, running: list[Sequence], steps: int, chance: random.Random) -> list[list[int]]:
    for _ in range(steps):
        batch = [item for item in running if item.in_kv == 0 or chance.random() < 0.5] or running[:1]
        result = runner.execute(ScheduledBatch(tuple(item.slice() for item in batch)))
        for item, drawn in zip(batch, result.slices, strict=True):
            item.in_kv = len(item.tokens)
            item.tokens.append(drawn.tokens[0].token_id)
    return [item.tokens for item in running]


@pytest.mark.parametrize("kinds", KINDS)
def test_the_tokens_are_those_of_the_plain_runner(engine: Engine, packed: ModelRunner, kinds: str) -> None:
    answers = []
    for runner in (engine.runner, packed):
        engine.pool.tensor[1:].fill_(float("nan"))  # nothing may be read that was not written
        running = sequences(engine.architecture.vocab_size, 3)
        for item, kind in zip(running, KINDS[kinds], strict=True):
            item.sampling = kind
        answers.append(generate(runner, running, 30, random.Random(1)))
    assert answers[0] == answers[1]
    assert packed.steps is not None
    assert len(packed.steps._programs) > 2  # several shapes were used
    reasons = set(packed.steps.drawn_behind)
    if kinds == "greedy":
        assert not reasons
    elif packed.steps._draws is not None:
        assert reasons == ({OnHost.LOGPROBS} if kinds == "all" else set())
    else:
        assert OnHost.KERNELS in reasons
    assert len({tuple(tokens[-10:]) for tokens in answers[0]}) > 3  # the model does not say one thing only


def test_log_probabilities_are_reported_as_ever(engine: Engine, packed: ModelRunner) -> None:
    reports = []
    for runner in (engine.runner, packed):
        item = Sequence([5, 6, 7], 1, logprobs=3)
        generate(runner, [item], 1, random.Random(1))
        reports.append(runner.execute(ScheduledBatch((item.slice(),))).slices[0].tokens[0].logprob)
    first, second = reports
    assert first is not None
    assert second is not None
    assert first.token_id == second.token_id
    assert [token_id for token_id, _ in first.top] == [token_id for token_id, _ in second.top]
    assert first.logprob == pytest.approx(second.logprob, abs=1e-4)


def test_a_step_can_be_launched_before_the_one_before_is_read(engine: Engine, packed: ModelRunner) -> None:
    """Placeholders stand for tokens that only the device knows yet, whatever row their sequence has now."""
    steps = packed.steps
    assert steps is not None
    answers = []
    for ahead in (False, True):
        kinds = [{}] * 4 if steps._draws is None else DRAWN[:4]
        running = [
            Sequence(item.tokens, 1 + 6 * row, **kinds[row])
            for row, item in enumerate(sequences(engine.architecture.vocab_size, 9)[:4])
        ]
        generate(engine.runner, running, 1, random.Random(1))
        chance = random.Random(0)
        unread: list[tuple[list[Sequence], PendingStep]] = []
        for _ in range(12):
            batch = chance.sample(running, len(running))
            scheduled = ScheduledBatch(tuple(item.slice() for item in batch))
            bucket = steps.bucket_of(scheduled)
            assert bucket is not None
            unread.append((batch, steps.launch(scheduled, bucket)))
            for row, item in enumerate(batch):
                item.in_kv = len(item.tokens)
                item.tokens.append(-1 - row)
            while len(unread) > int(ahead):
                read(*unread.pop(0))
        for launched in unread:
            read(*launched)
        answers.append([item.tokens for item in running])
    assert answers[0] == answers[1]
    assert min(map(min, answers[0])) >= 0


def read(batch: list[Sequence], pending: PendingStep) -> None:
    for item, token_id in zip(batch, pending.token_ids(), strict=True):
        item.tokens[next(place for place, known in enumerate(item.tokens) if known < 0)] = token_id


def test_what_has_no_bucket_goes_the_usual_way(engine: Engine, packed: ModelRunner) -> None:
    steps = packed.steps
    assert steps is not None
    one = SequenceSlice([1], 3, [1], (spec(4),))
    assert steps.bucket_of(ScheduledBatch((one,))) is not None
    others = (
        dataclasses.replace(one, token_ids=[1, 2]),
        dataclasses.replace(one, prompt_logprobs=1),
        dataclasses.replace(one, samples=(spec(4), spec(4, choice=1))),
        dataclasses.replace(one, start=MOST_TOKENS, block_table=list(range(1, 8))),
    )
    for item in others:
        assert steps.bucket_of(ScheduledBatch((one, item))) is None
    assert steps.bucket_of(ScheduledBatch((one,) * (MOST_ROWS + 1))) is None


def test_logits_that_are_no_numbers_are_an_error(engine: Engine, packed: ModelRunner) -> None:
    item = Sequence([5, 6], 1)
    generate(packed, [item], 1, random.Random(1))
    engine.pool.tensor[1] = float("nan")
    with pytest.raises(EngineFailure, match="not finite"):
        packed.execute(ScheduledBatch((item.slice(),)))
    engine.pool.tensor.zero_()


def test_padding_touches_no_block_but_its_own(engine: Engine, packed: ModelRunner) -> None:
    engine.pool.tensor.zero_()
    item = Sequence([5, 6], 1)
    generate(packed, [item], 1, random.Random(1))
    before = engine.pool.tensor.clone()
    three = [dataclasses.replace(item.slice(), block_table=[block]) for block in (1, 7, 13)]  # of a bucket of four
    packed.execute(ScheduledBatch(tuple(three)))
    changed = (engine.pool.tensor != before).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    assert set(changed) <= {1, 7, 13, engine.pool.num_blocks - 1}
    assert {1, 7, 13} <= set(changed)


def test_a_row_that_its_rules_leave_nothing_is_an_error_and_the_next_step_computes(engine: Engine, packed: ModelRunner) -> None:
    """Also where the next one was launched behind it: there is some token to look up."""
    vocab = engine.architecture.vocab_size
    nothing = RowRules(banned_token_ids=np.arange(vocab))
    first, second = Sequence([5, 6], 1), Sequence([7], 8)
    generate(packed, [first, second], 1, random.Random(1))
    first.sampling = {"rules": nothing}
    broken = packed.launch(ScheduledBatch((first.slice(), second.slice())))
    steps = packed.steps
    assert steps is not None
    if steps._draws is not None:
        behind = SequenceSlice([-1], first.in_kv + 1, first.blocks[:1], (spec(4),))
        following = packed.launch(ScheduledBatch((behind,)))
        assert 0 <= following.collect().slices[0].tokens[0].token_id < vocab
    with pytest.raises(EngineFailure, match="not finite"):
        broken.collect()


def test_more_edits_than_there_is_room_for_are_made_by_the_runner(engine: Engine, packed: ModelRunner) -> None:
    steps = packed.steps
    assert steps is not None
    several = Penalties(np.arange(300), np.ones(300, dtype=np.float32), 1.1, 0.2, 0.0)
    tokens = []
    for runner in (engine.runner, packed):
        running = [Sequence([5 + row, 6], 1 + 6 * row, rules=RowRules(penalties=several)) for row in range(MOST_ROWS)]
        generate(runner, running, 1, random.Random(1))
        drawn = runner.execute(ScheduledBatch(tuple(item.slice() for item in running)))
        tokens.append([item.tokens[0].token_id for item in drawn.slices])
    assert tokens[0] == tokens[1]
    assert set(steps.drawn_behind) == {OnHost.KERNELS if steps._draws is None else OnHost.EDITS}
