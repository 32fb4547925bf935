"""Engines with few-bit weights and rounded KV: what they say, what they refuse, and torch where there is no compiler."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from structlog.testing import capture_logs

from common.config import EngineConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.loader import load_stored_weights, load_weights
from common.engine.models.llama import LlamaModel
from common.engine.native.model import NativeModel
from common.errors import ConfigError, ModelLoadError
from support.tiny_gguf import make_tiny_gguf
from support.tiny_models import make_tiny_model

TOKENS = [int(token) for token in torch.randint(3, 384, (40,), generator=torch.Generator().manual_seed(0))]
KINDS = ("Q4_0", "Q4_1", "Q8_0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Path]:
    to = tmp_path_factory.mktemp("gguf")
    return {
        kind: make_tiny_gguf(folder, to / f"{kind}.gguf", quantisation=GGMLQuantizationType[kind]) for kind in (*KINDS, "F16")
    }


def build(path: Path, **config: Any) -> Engine:
    settings = EngineConfig.model_validate({"device": "cpu", "dtype": "float32", "kv_pool_tokens": 512, **config})
    return build_engine(path, settings, threads=1, model_digest="m", tokenizer_digest="t")


def logits(engine: Engine, *cuts: int) -> torch.Tensor:
    borders = [0, *cuts, len(TOKENS)]
    parts = [
        engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(TOKENS[first:end], first, [1, 2, 3]),)))
        for first, end in pairwise(borders)
    ]
    return torch.cat(parts)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_a_files_own_weights_are_computed_with(files: dict[str, Path], kind: str) -> None:
    """Torch with the dequantised file is the truth; what is left is the rounding of rows to 8 bits."""
    engine = build(files[kind], weights="file", kernels="native")
    assert isinstance(engine.runner._model, NativeModel)
    truth = logits(build(files[kind], kernels="torch"))
    got = logits(engine)
    assert distance(got, truth) < 0.06
    assert torch.equal(logits(engine, 1, 17, 33), got)
    others = [logits(build(files[other], kernels="torch")) for other in KINDS if other != kind]
    assert min(distance(got, other) for other in others) > 2 * distance(got, truth)


def test_a_file_is_viewed_and_not_copied(files: dict[str, Path]) -> None:
    _, stored = load_stored_weights(files["Q4_1"], torch.float32)
    _, tensors = load_weights(files["Q4_1"], torch.float32)
    lines = Path("/proc/self/maps").read_text().splitlines()
    mappings = [
        tuple(int(part, 16) for part in line.split()[0].split("-")) for line in lines if line.endswith(str(files["Q4_1"]))
    ]
    for name, weight in stored.items():
        if isinstance(weight, torch.Tensor):
            assert weight.dim() == 1
            assert torch.equal(weight, tensors[name])
        else:
            assert torch.equal(weight.dequantised(), tensors[name])
            address = weight.blocks.data_ptr()
            mapped = any(first <= address < end for first, end in mappings)
            assert mapped == ("q_proj" not in name and "k_proj" not in name), "their rows are in another order there"


def test_what_no_kernel_knows_is_read_in_full(files: dict[str, Path]) -> None:
    engine = build(files["F16"], weights="file", kernels="native")
    assert distance(logits(engine), logits(build(files["F16"], kernels="torch"))) < 1e-4


def test_torch_computes_with_the_same_weights_where_no_compiler_is(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(build(files["Q4_1"], kernels="torch"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PDSERVE_HOME", str(tmp_path / "home"))
    with capture_logs() as logs:
        engine = build(files["Q4_1"], weights="file")
        successor = engine.runner._successor
        assert successor is not None
        assert successor.wait(60)
        assert torch.equal(logits(engine), expected)
    assert isinstance(engine.runner._model, LlamaModel)
    assert [entry["log_level"] for entry in logs] == ["warning"], logs
    with pytest.raises(ConfigError, match="native") as refused:
        build(files["Q4_1"], weights="file", kernels="native")
    assert refused.value.param == "engine.kernels"


def test_four_bits_natively_are_those_of_torch(folder: Path) -> None:
    plain = logits(build(folder, kernels="torch"))
    by_torch = logits(build(folder, kernels="torch", weights="int4"))
    native = logits(build(folder, kernels="native", weights="int4"))
    assert distance(native, by_torch) < 0.06
    assert distance(plain, by_torch) > 2 * distance(native, by_torch)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"weights": "file", "kernels": "triton"}, "engine.weights"),
        ({"kv_dtype": "int8", "kernels": "triton"}, "engine.kv_dtype"),
        ({"weights": "fp8", "kernels": "native"}, "engine.kernels"),
    ],
)
def test_what_cannot_be_had_together_is_refused_by_name(files: dict[str, Path], changes: dict[str, str], param: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(files["Q4_1"], **changes)
    assert refused.value.param == param


def test_a_folder_has_no_blocks(folder: Path) -> None:
    with pytest.raises(ConfigError, match="GGUF") as refused:
        build(folder, weights="file")
    assert refused.value.param == "engine.weights"
    with pytest.raises(ModelLoadError, match="GGUF"):
        load_stored_weights(folder, torch.float32)


def test_each_way_has_a_fingerprint_of_its_own(files: dict[str, Path]) -> None:
    ways: list[dict[str, str]] = [
        {},
        *({"weights": weights} for weights in ("int8", "int4", "file")),
        {"kv_dtype": "int8"},
        {"kv_dtype": "int8", "dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"kv_dtype": "int8", "weights": "file"},
    ]
    layouts = [build(files["Q4_1"], kernels="torch", **way).layout for way in ways]
    assert len({layout.fingerprint for layout in layouts}) == len(ways)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_kv_costs_little_and_takes_less(folder: Path, kernels: str, dtype: str) -> None:
    plain, rounded = (build(folder, kernels=kernels, dtype=dtype, kv_dtype=kv) for kv in ("model", "int8"))
    layout = rounded.layout
    assert layout.row_bytes == layout.head_dim + 4
    assert rounded.pool.buffer.nbytes == layout.block_bytes * rounded.pool.num_blocks
    assert layout.block_bytes * (4 if dtype == "float32" else 2) > plain.layout.block_bytes > 1.5 * layout.block_bytes
    truth = logits(build(folder, kernels="torch"))
    assert distance(logits(rounded), truth) < distance(logits(plain), truth) + 0.06
    assert distance(logits(rounded), logits(plain)) > 0, "nothing was rounded"


@pytest.mark.parametrize("exact", [False, True])
def test_rounded_kv_does_not_depend_on_chunks(folder: Path, exact: bool) -> None:
    """A row is rounded by itself: what is exact stays exact, what was cached continues like what was computed."""
    config: dict[str, Any] = {"exact": True} if exact else {"kernels": "native"}
    engine = build(folder, kv_dtype="int8", **config)
    whole = logits(engine)
    memory = engine.pool.tensor.clone()
    for cuts in ((1,), (16, 17), (5, 30, 39)):
        assert torch.equal(logits(engine, *cuts), whole)
        assert torch.equal(engine.pool.tensor, memory)
    engine.runner.copy_block(1, 9)
    assert torch.equal(engine.pool.tensor[9], memory[1])
