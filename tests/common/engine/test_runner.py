"""The runner and the engine around it, on tiny models: what a step returns, and what it leaves in the pool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import EngineConfig
from common.engine.batch import ForwardResult, SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.kv_pool import FIRST_BLOCK, NULL_BLOCK
from common.engine.native.model import NativeModel
from common.engine.token_rules import RowRules
from common.errors import ConfigError, EngineFailure, InvalidRequest, ModelLoadError
from common.types import SampledToken
from support.tiny_models import make_tiny_model

GREEDY = SampleSpec(position=0, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
TOKENS = [int(token) for token in torch.randint(3, 384, (400,), generator=torch.Generator().manual_seed(0))]


def build(path: Path, **config: object) -> Engine:
    settings = EngineConfig(**{"device": "cpu", "dtype": "float32", "kv_pool_tokens": 2048, **config})
    return build_engine(path, settings, threads=1, model_digest="m", tokenizer_digest="t")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["torch", "exact", "native"])
def engine(tiny: Path, request: pytest.FixtureRequest) -> Engine:
    return build(tiny, exact=True, kernels="torch") if request.param == "exact" else build(tiny, kernels=request.param)


def all_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    blocks = engine.blocks.allocate(-(-len(tokens) // 16))
    logits = engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(tokens, 0, blocks),)))
    engine.blocks.release(blocks)
    return logits


def test_only_slices_that_sample_get_tokens(engine: Engine) -> None:
    expected = all_logits(engine, TOKENS[:40])
    first, second = engine.blocks.allocate(3), engine.blocks.allocate(3)
    silent = SequenceSlice(TOKENS[:30], 0, first)
    speaking = SequenceSlice(TOKENS[:20], 0, second, (GREEDY, replace(GREEDY, choice=1)))
    result = engine.runner.execute(ScheduledBatch((silent, speaking)))
    assert result.slices[0].tokens == ()
    assert [token.token_id for token in result.slices[1].tokens] == [int(expected[19].argmax())] * 2
    result = engine.runner.execute(
        ScheduledBatch((replace(silent, token_ids=TOKENS[30:40], start=30, samples=(GREEDY,)), replace(speaking, samples=())))
    )
    assert result.slices[0].tokens[0].token_id == int(expected[39].argmax())
    assert result.slices[1].tokens == ()


def test_best_tokens_are_those_of_one_at_a_time(engine: Engine) -> None:
    """Masked or not, behind right guesses and wrong ones, where none may come at some place, beside slices that draw nothing."""
    may_come = list(range(0, 384, 7))

    def continued(tokens: list[int], allowed: list[int]) -> list[int]:
        answer: list[int] = []
        for _ in range(4):
            row = all_logits(engine, [*tokens, *answer])[-1]
            answer.append(allowed[int(row[allowed].argmax())])
        return answer

    free, bound = continued(TOKENS[:40], list(range(384))), continued(TOKENS[:40], may_come)
    masked = replace(GREEDY, rules=RowRules(mask=MaskOf(may_come)))  # type: ignore[arg-type]
    nothing = replace(GREEDY, rules=RowRules(mask=MaskOf([])))  # type: ignore[arg-type]
    cases: list[tuple[list[int], tuple[SampleSpec, ...], list[int]]] = [  # guesses, samples, what is to come
        ([], (), []),
        ([], (GREEDY,), free[:1]),
        ([], (masked,), bound[:1]),
        ([], (nothing,), []),
        (free[:3], (GREEDY,) * 4, free),
        ([*free[:2], free[2] ^ 1], (GREEDY,) * 4, free[:3]),
        (bound[:3], (masked,) * 4, bound),
        ([bound[0] ^ 1, *bound[1:3]], (masked,) * 4, bound[:1]),
        (bound[:3], (masked, masked, nothing, nothing), bound[:2]),
    ]
    slices = []
    for guesses, samples, _ in cases:
        slices.append(SequenceSlice([*TOKENS[:40], *guesses], 0, engine.blocks.allocate(3), samples, num_drafts=len(guesses)))
    result = engine.runner.execute(ScheduledBatch(tuple(slices), keeps_rows=True))
    assert [[token.token_id for token in item.tokens] for item in result.slices] == [coming for *_, coming in cases]
    assert [isinstance(item.error, InvalidRequest) for item in result.slices] == [place == 3 for place in range(len(cases))]
    assert [item.row is not None for item in result.slices] == [bool(coming) for *_, coming in cases]


class MaskOf:
    """A `NextMask` that lets these tokens come."""

    def __init__(self, token_ids: list[int]) -> None:
        bits = np.zeros(416, dtype=np.uint8)
        bits[token_ids] = 1
        self.words = np.packbits(bits, bitorder="little").view(np.uint32)
        self.error = None if token_ids else InvalidRequest("nothing may come", param="grammar")

    def work_out(self) -> None:
        pass


def test_an_empty_batch_is_an_empty_result(engine: Engine) -> None:
    assert engine.runner.execute(ScheduledBatch(())) == ForwardResult()


@pytest.mark.parametrize("chunk", [50, 200])
def test_prompt_logprobs_are_those_of_the_next_tokens(engine: Engine, chunk: int) -> None:
    tokens = TOKENS[:200]
    expected = torch.log_softmax(all_logits(engine, tokens).double(), dim=-1)
    blocks = engine.blocks.allocate(13)
    reports = []
    for start in range(0, 200, chunk):
        following = tokens[start + 1 : start + chunk + 1]
        share = SequenceSlice(tokens[start : start + chunk], start, blocks, (), 2, following)
        reports += engine.runner.execute(ScheduledBatch((share,))).slices[0].prompt_logprobs
    assert [report.token_id for report in reports] == tokens[1:]
    for position, report in enumerate(reports):
        assert report.logprob == pytest.approx(float(expected[position, report.token_id]), abs=1e-4)
        assert [value for _, value in report.top] == pytest.approx(expected[position].topk(2).values.tolist(), abs=1e-4)


def test_batches_larger_than_the_buffers_are_computed(engine: Engine) -> None:
    expected = all_logits(engine, TOKENS[:100])[-1]
    tables = [engine.blocks.allocate(7) for _ in range(16)]
    batch = ScheduledBatch(tuple(SequenceSlice(TOKENS[:100], 0, table) for table in tables))
    assert batch.num_tokens > 1024
    torch.testing.assert_close(engine.runner.compute_logits(batch), expected.expand(16, -1), rtol=1e-4, atol=1e-4)


def test_mixed_batches_equal_sequences_alone(engine: Engine) -> None:
    expected = all_logits(engine, TOKENS)
    ends = [1, 2, 16, 17, 65, 190, 400]
    tables = [engine.blocks.allocate(-(-end // 16)) for end in ends]
    starts = [0, 1, 15, 10, 64, 100, 399]
    for start, table in zip(starts, tables, strict=True):
        if start:
            engine.runner.compute_logits(ScheduledBatch((SequenceSlice(TOKENS[:start], 0, table),)))
    slices = [SequenceSlice(TOKENS[s:e], s, t) for s, e, t in zip(starts, ends, tables, strict=True)]
    got = engine.runner.compute_logits(ScheduledBatch(tuple(slices)))
    torch.testing.assert_close(got, expected[[end - 1 for end in ends]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong_at", [None, 0, 2, 5])
def test_drafts_are_checked_as_if_nobody_had_guessed(engine: Engine, wrong_at: int | None) -> None:
    """Six drafts over a block border, beside another sequence: the draws up to the first wrong draft and the one there, bit by
    bit those of one token at a time where rows do not depend on their batch. What a wrong draft left in KV changes nothing."""
    bitwise = engine.layout.exact or isinstance(engine.runner._model, NativeModel)
    spec = replace(GREEDY, logprobs=3)

    other = engine.blocks.allocate(3)

    def execute(tokens: list[int], start: int, table: list[int], num_drafts: int = 0) -> list[SampledToken]:
        samples = tuple(replace(spec, position=start + len(tokens) - num_drafts + i) for i in range(num_drafts + 1))
        item = SequenceSlice(tokens, start, table, samples, num_drafts=num_drafts)
        return list(engine.runner.execute(ScheduledBatch((SequenceSlice(TOKENS[:33], 0, other), item))).slices[1].tokens)

    table = engine.blocks.allocate(3)
    alone = execute(TOKENS[:13], 0, table)
    while len(alone) < 12:
        alone += execute([alone[-1].token_id], 12 + len(alone), table)
    said = [token.token_id for token in alone]

    again = engine.blocks.allocate(3)
    found = execute(TOKENS[:13], 0, again)
    drafts = said[1:7]
    if wrong_at is not None:
        drafts[wrong_at] = (drafts[wrong_at] + 1) % 300
    found += execute([said[0], *drafts], 13, again, num_drafts=6)
    assert len(found) == 1 + (7 if wrong_at is None else wrong_at + 1)
    while len(found) < 12:
        found += execute([found[-1].token_id], 12 + len(found), again)
    assert [token.token_id for token in found] == said
    if bitwise:
        assert found == alone
    else:
        assert [token.logprob.logprob for token in found] == pytest.approx([token.logprob.logprob for token in alone], abs=1e-4)


def test_a_step_touches_only_its_own_blocks(engine: Engine) -> None:
    engine.pool.tensor[FIRST_BLOCK:] = torch.nan
    blocks = engine.blocks.allocate(3)
    logits = engine.runner.compute_logits(ScheduledBatch((SequenceSlice(TOKENS[:20], 0, blocks),)))
    assert torch.isfinite(logits).all()
    assert not engine.pool.tensor[NULL_BLOCK].any()
    assert torch.isfinite(engine.pool.tensor[blocks[:2]]).all()
    assert not engine.pool.tensor[blocks[1], :, :, :, 4:].any()
    others = [block for block in range(FIRST_BLOCK, engine.pool.num_blocks) if block not in blocks[:2]]
    assert engine.pool.tensor[others].isnan().all()


def test_entering_a_block_by_decode_clears_what_broken_memory_left(engine: Engine) -> None:
    engine.pool.tensor[FIRST_BLOCK:] = torch.nan
    expected = all_logits(engine, TOKENS[:40])
    engine.pool.tensor[FIRST_BLOCK:] = torch.nan
    blocks = engine.blocks.allocate(3)
    got = [engine.runner.compute_logits(ScheduledBatch((SequenceSlice(TOKENS[i : i + 1], i, blocks),)))[0] for i in range(40)]
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-3, atol=1e-3)


def test_no_token_comes_from_broken_kv(engine: Engine) -> None:
    blocks = engine.blocks.allocate(3)
    engine.runner.compute_logits(ScheduledBatch((SequenceSlice(TOKENS[:20], 0, blocks),)))
    engine.pool.tensor[blocks[0], 0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(EngineFailure, match="finite"):
        engine.runner.execute(ScheduledBatch((SequenceSlice(TOKENS[20:21], 20, blocks, (GREEDY,)),)))


@pytest.mark.parametrize(
    "share",
    [
        SequenceSlice([], 0, [1], (GREEDY,)),
        SequenceSlice([3], 0, [1], (), 1, [4, 5]),
        SequenceSlice([3, 4], 0, [1], (GREEDY,), num_drafts=1),
        SequenceSlice([3, 4], 0, [1], (GREEDY, GREEDY, GREEDY), num_drafts=2),
    ],
)
def test_slices_that_make_no_sense_are_refused(engine: Engine, share: SequenceSlice) -> None:
    with pytest.raises(EngineFailure):
        engine.runner.execute(ScheduledBatch((share,)))


def test_the_engine_states_its_shape(tiny: Path) -> None:
    engine = build(tiny, kv_pool_tokens=1001, block_tokens=8, exact=True, kernels="torch", prefix_cache=False)
    assert engine.blocks.num_total == 126
    assert engine.pool.num_blocks == 126 + FIRST_BLOCK
    assert engine.max_model_tokens == 1008
    layout = engine.layout
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_tokens) == (2, 2, 16, 8)
    assert (layout.dtype, layout.exact, layout.model_digest, layout.tokenizer_digest) == ("float32", True, "m", "t")
    assert not engine.blocks.prefix_cache
    assert build(tiny, kv_pool_tokens=100_000).max_model_tokens == 2048
    assert build(tiny, kv_pool_tokens=100_000, max_model_tokens=300).max_model_tokens == 300


def test_the_last_position_that_is_allowed_can_be_computed(tiny: Path) -> None:
    engine = build(tiny, max_model_tokens=64)
    assert torch.isfinite(all_logits(engine, TOKENS[:64])).all()


def test_the_pool_lies_in_given_memory(tiny: Path) -> None:
    given: list[bytearray] = []

    class Memory:
        descriptor = None

        def allocate(self, block_bytes: int, num_blocks: int) -> memoryview:
            given.append(bytearray(block_bytes * num_blocks))
            return memoryview(given[0])

    config = EngineConfig(device="cpu", dtype="float32", kv_pool_tokens=256)
    engine = build_engine(tiny, config, threads=1, model_digest="m", tokenizer_digest="t", memory=Memory())
    blocks = engine.blocks.allocate(1)
    engine.runner.compute_logits(ScheduledBatch((SequenceSlice(TOKENS[:16], 0, blocks),)))
    size = engine.layout.block_bytes
    piece = given[0][blocks[0] * size : (blocks[0] + 1) * size]
    assert any(piece)
    assert bytes(piece) == bytes(engine.pool.buffer[blocks[0] * size : (blocks[0] + 1) * size])
    assert not any(given[0][: size * FIRST_BLOCK])


def test_dtype_auto_is_what_the_cpu_multiplies_natively(tiny: Path) -> None:
    flags = Path("/proc/cpuinfo").read_text()
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert build(tiny, dtype="auto").dtype == (torch.bfloat16 if native else torch.float32)
    assert build(tiny, dtype="float16").dtype == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_missing_device_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="CUDA"):
        build(tiny, device="cuda")


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        build(tmp_path / "nowhere")
