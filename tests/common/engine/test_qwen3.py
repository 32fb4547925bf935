"""Qwen 3 against transformers, dense and as a mixture: teacher-forced logits at every position, exact mode, and what is
refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.config import EngineConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.loader import load_architecture
from common.errors import ModelLoadError
from support.tiny_qwen3 import make_tiny_qwen3, qwen3_oracle

LENGTH = 60
KINDS = {"dense": {}, "mixture": {"experts": 8}, "mixture without normalising": {"experts": 8, "normalise": False}}


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("qwen3"), **KINDS[request.param])


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(3, 384, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()


def build(path: Path, *, exact: bool = False, weights: str = "model") -> Engine:
    config = EngineConfig(device="cpu", dtype="float32", exact=exact, kv_pool_tokens=1024, weights=weights)
    return build_engine(path, config, threads=1, model_digest="m", tokenizer_digest="t")


def teacher_forced(engine: Engine, tokens: list[int], chunk: int) -> torch.Tensor:
    blocks = engine.blocks.allocate(-(-len(tokens) // engine.layout.block_tokens))
    parts = [
        engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(tokens[start : start + chunk], start, blocks),)))
        for start in range(0, len(tokens), chunk)
    ]
    engine.blocks.release(blocks)
    return torch.cat(parts)


@pytest.mark.parametrize("exact", [False, True])
def test_it_agrees_with_transformers(folder: Path, tokens: list[int], exact: bool) -> None:
    with torch.inference_mode():
        expected = qwen3_oracle(folder)(torch.tensor([tokens])).logits[0]
    engine = build(folder, exact=exact)
    for chunk in (LENGTH, 7):
        got = teacher_forced(engine, tokens, chunk)
        assert float((got - expected).abs().max()) <= 2e-3
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_exact_mode_holds(folder: Path, tokens: list[int]) -> None:
    engine = build(folder, exact=True)
    whole = teacher_forced(engine, tokens, LENGTH)
    for chunk in (1, 13):
        assert torch.equal(teacher_forced(engine, tokens, chunk), whole)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_rounded_weights_say_nearly_the_same(folder: Path, tokens: list[int], weights: str) -> None:
    plain = teacher_forced(build(folder), tokens, LENGTH).log_softmax(-1)
    rounded = teacher_forced(build(folder, weights=weights), tokens, LENGTH).log_softmax(-1)
    assert not torch.equal(plain, rounded)
    difference = (plain - rounded).abs().median()
    assert difference < {"int8": 0.2, "fp8": 0.6, "int4": 3.0}[weights]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"num_experts_per_tok": 9}, "experts_per_token"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding_window"),
    ],
)
def test_what_would_change_the_numbers_is_refused(tmp_path: Path, change: dict[str, object], named: str) -> None:
    folder = make_tiny_qwen3(tmp_path, experts=8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelLoadError) as refused:
        load_architecture(folder)
    assert refused.value.param == named
