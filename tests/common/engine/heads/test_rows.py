"""Which hidden row a step keeps: the one that the last token was drawn from, whatever was guessed on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config import EngineConfig
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from support.tiny_models import make_tiny_model

GREEDY = SampleSpec(position=0, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
TOKENS = [int(token) for token in torch.randint(3, 384, (40,), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(params=["exact", "native"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Engine:
    """Whose rows do not depend on their batch."""
    how = {"exact": True} if request.param == "exact" else {"kernels": "native"}
    settings = EngineConfig(device="cpu", dtype="float32", kv_pool_tokens=1024, **how)
    return build_engine(make_tiny_model(tmp_path), settings, threads=1, model_digest="m", tokenizer_digest="t")


def one_by_one(engine: Engine, count: int) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens behind TOKENS, and the rows that they were drawn from."""
    blocks = engine.blocks.allocate(4)
    tokens, said, rows = list(TOKENS), [], []
    start = 0
    for _ in range(count):
        item = SequenceSlice(tokens[start:], start, blocks, (GREEDY,))
        result = engine.runner.execute(ScheduledBatch((item,), keeps_rows=True)).slices[0]
        start = len(tokens)
        said.append(result.tokens[0].token_id)
        tokens.append(said[-1])
        assert result.row is not None
        rows.append(result.row.values.clone())
    engine.blocks.release(blocks)
    return said, rows


def test_the_row_of_the_last_token_is_kept(engine: Engine) -> None:
    said, rows = one_by_one(engine, 5)
    assert all(not torch.equal(rows[0], row) for row in rows[1:])
    for num_right in range(4):
        first, second, third = (engine.blocks.allocate(4) for _ in range(3))
        wrong = [(token + 1) % 384 for token in said[num_right : num_right + 2]]
        guessed = [*TOKENS, *said[:num_right], *wrong]
        slices = (
            SequenceSlice(TOKENS[:9], 0, first),
            SequenceSlice(guessed, 0, second, (GREEDY,) * (num_right + 3), num_drafts=num_right + 2),
            SequenceSlice(TOKENS, 0, third, (GREEDY, replace(GREEDY, choice=1))),
        )
        silent, found, forked = engine.runner.execute(ScheduledBatch(slices, keeps_rows=True)).slices
        assert silent.row is None
        assert [token.token_id for token in found.tokens] == said[: num_right + 1]
        assert found.row is not None
        assert torch.equal(found.row.values, rows[num_right])
        assert forked.row is not None
        assert torch.equal(forked.row.values, rows[0])
        for blocks in (first, second, third):
            engine.blocks.release(blocks)


def test_rows_are_kept_only_if_they_are_wanted(engine: Engine) -> None:
    blocks = engine.blocks.allocate(4)
    item = SequenceSlice(TOKENS, 0, blocks, (GREEDY,))
    assert engine.runner.execute(ScheduledBatch((item,))).slices[0].row is None
