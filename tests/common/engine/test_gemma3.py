"""Gemma 3 against transformers: teacher-forced logits at every position, across the border of the window, and greedy answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from common.config import EngineConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.loader import load_architecture, load_weights
from common.errors import ConfigError, ModelLoadError
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer
from support.oracles import gguf_gemma_oracle
from support.tiny_gemma import WINDOW, gemma_oracle, make_tiny_gemma, make_tiny_gemma_gguf

LENGTH = 5 * WINDOW + 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return torch.randint(3, 384, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def expected(folder: Path, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return gemma_oracle(folder)(torch.tensor([tokens])).logits[0]


def build(path: Path, *, exact: bool = False, kernels: str = "auto", dtype: str = "float32") -> Engine:
    config = EngineConfig(device="cpu", dtype=dtype, exact=exact, kernels=kernels, kv_pool_tokens=2048)
    return build_engine(path, config, threads=1, model_digest="m", tokenizer_digest="t")


def teacher_forced(engine: Engine, tokens: list[int], chunk: int) -> torch.Tensor:
    blocks = engine.blocks.allocate(-(-len(tokens) // engine.layout.block_tokens))
    parts = [
        engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(tokens[start : start + chunk], start, blocks),)))
        for start in range(0, len(tokens), chunk)
    ]
    engine.blocks.release(blocks)
    return torch.cat(parts)


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    known = list(prompt)
    blocks = engine.blocks.allocate(-(-(len(prompt) + count) // engine.layout.block_tokens))
    start = 0
    for _ in range(count):
        step = ScheduledBatch((SequenceSlice(known[start:], start, blocks),))
        start = len(known)
        known.append(int(engine.runner.compute_logits(step)[0].argmax()))
    engine.blocks.release(blocks)
    return known[len(prompt) :]


@pytest.mark.parametrize("exact", [False, True])
def test_a_tiny_gemma_agrees_with_transformers(folder: Path, tokens: list[int], expected: torch.Tensor, exact: bool) -> None:
    engine = build(folder, exact=exact)
    for chunk in (LENGTH, 37, 1):
        got = teacher_forced(engine, tokens, chunk)
        assert float((got - expected).abs().max()) <= 1e-3
        assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_exact_mode_holds_across_windows(folder: Path, tokens: list[int]) -> None:
    engine = build(folder, exact=True)
    whole = teacher_forced(engine, tokens, LENGTH)
    for chunk in (1, 13, 64):
        assert torch.equal(teacher_forced(engine, tokens, chunk), whole)


def test_greedy_answers_are_those_of_transformers(folder: Path, tokens: list[int]) -> None:
    prompt = tokens[: WINDOW - 5]
    with torch.inference_mode():
        answer = gemma_oracle(folder).generate(
            torch.tensor([prompt]), max_new_tokens=3 * WINDOW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert greedy(build(folder), prompt, 3 * WINDOW) == answer[0, len(prompt) :].tolist()


def test_the_window_is_seen_in_the_logits(folder: Path, tokens: list[int], expected: torch.Tensor, tmp_path: Path) -> None:
    """The comparisons above can fail: with a window of one token more, and with one rotary base for all layers."""
    for name, change in (("wider", {"sliding_window": WINDOW + 1}), ("turned", {"rope_parameters": None, "rope_theta": 1e6})):
        other = tmp_path / name
        other.mkdir()
        for file in folder.iterdir():
            (other / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text()) | change
        config |= {"rope_local_base_freq": 1e6} if name == "turned" else {}
        (other / "config.json").unlink()
        (other / "config.json").write_text(json.dumps(config))
        got = teacher_forced(build(other), tokens, LENGTH)
        assert float((got - expected).abs().max()) > 0.05


def test_a_gguf_file_holds_the_same_model(folder: Path, tmp_path: Path) -> None:
    file = make_tiny_gemma_gguf(folder, tmp_path / "tiny.gguf")
    assert dataclasses.replace(load_architecture(file), rms_norm_eps=1e-6) == load_architecture(folder)  # it is stored in fp32
    (_, from_file), (_, from_folder) = load_weights(file, torch.float32), load_weights(folder, torch.float32)
    assert from_file.keys() == from_folder.keys()
    for name, tensor in from_folder.items():
        torch.testing.assert_close(from_file[name], tensor, rtol=0, atol=2e-7)  # 1 was added and taken away


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"query_pre_attn_scalar": 168}, "query_pre_attn_scalar"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "windows"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}, "rope scaling"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder: Path, tmp_path: Path, change: dict[str, object], named: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=named):
        load_architecture(tmp_path)


def test_native_kernels_are_refused_when_demanded(folder: Path) -> None:
    with pytest.raises(ConfigError, match="family gemma3"):
        build(folder, kernels="native")


def test_scaled_rotary_angles_in_a_file_are_refused(folder: Path, tmp_path: Path) -> None:
    file = make_tiny_gemma_gguf(folder, tmp_path / "tiny.gguf", settings={"gemma3.rope.scaling.type": "linear"})
    with pytest.raises(ModelLoadError, match="rope scaling 'linear'"):
        load_architecture(file)


@pytest.mark.model
def test_gemma3_270m_agrees_with_transformers(gemma3: ModelFiles) -> None:
    """Natural text beyond the window of 512 tokens, and a greedy answer."""
    tokenizer = Tokenizer.load(gemma3.path)
    text = (Path(__file__).parents[3] / "LICENSE").read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)[:560]
    oracle = gguf_gemma_oracle(gemma3.path)
    engine = build(gemma3.path)
    blocks = engine.blocks.allocate(-(-len(tokens) // 16))
    with torch.inference_mode():
        expected = oracle.model(torch.tensor([tokens])).last_hidden_state[0]
        expected = oracle.lm_head(expected[-40:])
    engine.runner.compute_logits(ScheduledBatch((SequenceSlice(tokens[:520], 0, blocks),)))
    got = engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(tokens[520:], 520, blocks),)))
    assert float((got - expected).abs().max()) <= 5e-3  # of logits whose spread is tens
    assert torch.equal(got.argmax(-1), expected.argmax(-1))
    answer = tokenizer.decode(greedy(engine, tokenizer.encode("The capital of France is Paris. The capital of Germany is"), 3))
    assert answer.strip().startswith("Berlin")
