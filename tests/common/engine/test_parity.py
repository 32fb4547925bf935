"""The engine against transformers, an implementation that shares no code with it: teacher-forced logits at every position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import EngineConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.loader import load_weights
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer
from support.oracles import gguf_oracle
from support.read_once import weights_read_once
from support.tiny_models import make_tiny_model

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embeddings": True, "hidden": 72, "heads": 9, "kv_heads": 3, "head_dim": 8},
    "biased": {"attention_bias": True, "kv_heads": 4},
    "llama 3": {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500_000.0, "layers": 3, "context": 4096},
}
MODES = ["torch", "exact", "native"]


def build(path: Path, mode: str, dtype: str = "float32") -> Engine:
    kernels = "torch" if mode == "exact" else mode
    config = EngineConfig(device="cpu", dtype=dtype, exact=mode == "exact", kernels=kernels, kv_pool_tokens=4096)
    return build_engine(path, config, threads=1, model_digest="m", tokenizer_digest="t")


def oracle(folder: Path) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def teacher_forced(engine: Engine, tokens: list[int], chunk: int) -> torch.Tensor:
    blocks = engine.blocks.allocate(-(-len(tokens) // engine.layout.block_tokens))
    parts = [
        engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(tokens[start : start + chunk], start, blocks),)))
        for start in range(0, len(tokens), chunk)
    ]
    engine.blocks.release(blocks)
    return torch.cat(parts)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_tiny_models_agree_with_transformers(tmp_path: Path, model: str, mode: str) -> None:
    length = 2100 if model == "llama 3" else 600  # far positions once, where angles are scaled as well
    folder = make_tiny_model(tmp_path, seed=1, **MODELS[model])
    tokens = torch.randint(3, 384, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = oracle(folder)(torch.tensor([tokens])).logits[0]
    engine = build(folder, mode)
    for chunk in (length, 37):
        got = teacher_forced(engine, tokens, chunk)
        assert float((got - expected).abs().max()) <= 1e-3
        assert float((got.argmax(-1) == expected.argmax(-1)).float().mean()) >= 0.999
    one_by_one = teacher_forced(engine, tokens[:60], 1)
    assert float((one_by_one - expected[:60]).abs().max()) <= 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_stays_near_float32(tmp_path: Path, mode: str) -> None:
    """Weights that bf16 can hold exactly, so that only the arithmetic differs. Mean error under 5 % of the logits' spread:
    eight bits of mantissa through two layers with peaked attention."""
    folder = make_tiny_model(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(3, 384, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    narrow = teacher_forced(build(folder, mode, "bfloat16"), tokens, 64)
    wide = teacher_forced(build(folder, mode), tokens, 64)
    assert float((narrow - wide).abs().mean() / wide.std()) < 0.05


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Rope scaling, the smallest of the features compared above, is far outside the tolerance when it is left out."""
    plain = make_tiny_model(tmp_path / "plain", rope_theta=500_000.0)
    scaled = make_tiny_model(tmp_path / "scaled", rope_theta=500_000.0, rope_scaling=LLAMA3_SCALING)
    tokens = list(range(3, 300))
    difference = teacher_forced(build(plain, "torch"), tokens, 300) - teacher_forced(build(scaled, "torch"), tokens, 300)
    assert float(difference.abs().max()) > 0.1


@pytest.fixture(scope="module")
def read_once() -> Iterator[None]:
    with weights_read_once():
        yield


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2: ModelFiles) -> torch.nn.Module:
    return gguf_oracle(smollm2.path)


@pytest.fixture(scope="module")
def smollm2_expected(smollm2: ModelFiles, smollm2_oracle: torch.nn.Module) -> tuple[list[int], torch.Tensor]:
    """Natural text, and what transformers makes of the same file."""
    text = (Path(__file__).parents[3] / "LICENSE").read_text(encoding="utf-8")
    tokens = Tokenizer.load(smollm2.path).encode(text)[:832]
    with torch.inference_mode():
        return tokens, smollm2_oracle(torch.tensor([tokens])).logits[0]


@pytest.mark.model
def test_the_default_models_weights_are_those_of_the_file(smollm2: ModelFiles, smollm2_oracle: torch.nn.Module) -> None:
    _, found = load_weights(smollm2.path, torch.float32)
    expected = smollm2_oracle.state_dict()
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.model
@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("mode", MODES)
def test_the_default_model_agrees_with_transformers(
    smollm2: ModelFiles, smollm2_expected: tuple[list[int], torch.Tensor], mode: str
) -> None:
    tokens, expected = smollm2_expected
    engine = build(smollm2.path, mode)
    blocks = engine.blocks.allocate(len(tokens) // 16)
    furthest, agreeing = 0.0, 0
    for start in range(0, len(tokens), 512):  # a chunk of a prompt, and one that goes on behind it
        share = SequenceSlice(tokens[start : start + 512], start, blocks)
        got, wanted = engine.runner.compute_all_logits(ScheduledBatch((share,))), expected[start : start + 512]
        agreeing += int((got.argmax(-1) == wanted.argmax(-1)).sum())
        furthest = max(furthest, float((got - wanted).abs().max()))
    assert furthest <= 1e-3
    assert agreeing >= 0.999 * len(tokens)
