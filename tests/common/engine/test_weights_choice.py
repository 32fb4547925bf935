"""What `engine.weights: auto` becomes, for each kind of file, and that the workers of a model come to the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from common.config import Config, EngineConfig
from common.engine.engine import build_engine
from common.engine.engine_plan import EnginePlan
from common.engine.loader import load_architecture
from common.engine.native.model import NativeModel
from common.engine.quantisation import WeightFormat
from common.engine.weights_choice import choose_weights
from support.tiny_gemma import make_tiny_gemma
from support.tiny_gguf import make_tiny_gguf
from support.tiny_models import make_tiny_model

FILE, MODEL = WeightFormat.FILE, WeightFormat.MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    return make_tiny_gguf(folder, tmp_path_factory.mktemp("gguf") / "m.gguf", quantisation=GGMLQuantizationType.Q4_1)


def chosen(path: Path, device: str = "cpu", **config: Any) -> WeightFormat:
    return choose_weights(EngineConfig(**config), path, load_architecture(path), device)


@pytest.mark.parametrize(("kind", "expected"), [("Q4_0", FILE), ("Q4_1", FILE), ("Q8_0", FILE), ("Q5_0", MODEL), ("F16", MODEL)])
def test_a_file_in_blocks_that_can_be_computed_with_is_computed_with(
    folder: Path, tmp_path: Path, kind: str, expected: WeightFormat
) -> None:
    path = make_tiny_gguf(folder, tmp_path / "m.gguf", quantisation=GGMLQuantizationType[kind])
    assert chosen(path) is chosen(path, dtype="bfloat16") is chosen(path, kernels="native") is expected


@pytest.mark.parametrize(
    ("name", "expected"), [("blk.1.ffn_down.weight", MODEL), ("token_embd.weight", FILE), ("output.weight", FILE)]
)
def test_one_matrix_of_a_layer_in_other_blocks_is_enough_for_the_models_own_type(
    folder: Path, tmp_path: Path, name: str, expected: WeightFormat
) -> None:
    apart = {name: GGMLQuantizationType.Q5_0}
    path = make_tiny_gguf(folder, tmp_path / "m.gguf", quantisation=GGMLQuantizationType.Q4_1, apart=apart)
    assert chosen(path) is expected


@pytest.mark.parametrize(
    "config", [{"exact": True}, {"dtype": "float32"}, {"dtype": "float16"}, {"kernels": "torch"}, {"kernels": "triton"}]
)
def test_who_asks_for_other_numbers_gets_the_models_own_type(in_blocks: Path, config: dict[str, Any]) -> None:
    assert chosen(in_blocks, **config) is MODEL


def test_what_kernels_do_not_know_is_left_as_it_is(in_blocks: Path, folder: Path, tmp_path: Path) -> None:
    assert chosen(folder) is MODEL
    assert chosen(make_tiny_gemma(tmp_path / "gemma")) is MODEL
    assert chosen(in_blocks, device="cuda") is MODEL


def test_what_is_named_is_taken(in_blocks: Path) -> None:
    assert chosen(in_blocks, weights="model") is MODEL
    assert chosen(in_blocks, weights="file", dtype="float32", exact=True) is FILE
    assert chosen(in_blocks, weights="int8", dtype="float32") is WeightFormat.INT8


@pytest.mark.parametrize(
    "pools", [{}, {"decode": "float32"}, {"prefill": "float16"}, {"prefill": "float32", "decode": "bfloat16"}]
)
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_pools_of_other_types_hold_the_same_weights(in_blocks: Path, pools: dict[str, str], dtype: str) -> None:
    """Workers with different formats refuse each other's KV; types of KV may differ."""
    model = {"name": "m", "source": str(in_blocks), "engine": {"dtype": dtype, "device": "cpu"}}
    model |= {pool: {"dtype": own} for pool, own in pools.items()}
    (read,) = Config.model_validate({"models": [model]}).models
    plans = [
        EnginePlan.of(
            in_blocks,
            pool.engine(read.engine),
            threads=1,
            model_digest="m",
            tokenizer_digest="t",
            parallel=None,
            announce=lambda _: None,
        )
        for pool in (read.prefill, read.decode)
    ]
    assert {plan.weight_format for plan in plans} == {MODEL if dtype == "float32" else FILE}
    assert len({plan.layout.model_digest for plan in plans}) == 1


def test_an_engine_of_the_default_settings_computes_with_the_files_blocks(in_blocks: Path) -> None:
    """And its KV is that of an engine which was told to: they may hand over to each other."""
    engines = [
        build_engine(
            in_blocks,
            EngineConfig(device="cpu", kv_pool_tokens=512, **named),
            threads=1,
            model_digest="m",
            tokenizer_digest="t",
        )
        for named in ({}, {"weights": "file"}, {"weights": "model"})
    ]
    assert isinstance(engines[0].runner._model, NativeModel)
    assert engines[0].layout == engines[1].layout
    assert engines[0].layout != engines[2].layout
