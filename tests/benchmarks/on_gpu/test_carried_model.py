"""A model that travels in parts is the model that was packed, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from benchmarks.on_gpu.carried_model import pack, unpack
from common.engine.loader import load_weights
from common.errors import ModelLoadError
from support.tiny_gguf import make_tiny_gguf
from support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_gguf(make_tiny_model(folder / "tiny"), folder / "tiny.gguf", quantisation=GGMLQuantizationType.Q4_1)


def test_what_is_unpacked_has_the_same_weights(model: Path, tmp_path: Path) -> None:
    packed_bytes = 20_000
    count = pack(model, tmp_path / "parts", packed_bytes)
    sizes = [(tmp_path / "parts" / f"part-{index}").stat().st_size for index in range(count)]
    assert count > 2
    assert all(size == packed_bytes for size in sizes[:-1])
    assert sum(sizes) < 0.4 * 4 * sum(tensor.numel() for tensor in load_weights(model, torch.float32)[1].values())
    unpack(tmp_path / "parts", tmp_path / "folder")
    (expected_shape, expected), (shape, weights) = (load_weights(path, torch.float32) for path in (model, tmp_path / "folder"))
    assert shape == expected_shape
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_part_that_lacks_or_is_another_is_named(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path, 20_000)
    part = tmp_path / "part-1"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelLoadError, match="part-1 is not what was packed"):
        unpack(tmp_path, tmp_path / "folder")
    part.unlink()
    with pytest.raises(ModelLoadError, match="part-1 is not there"):
        unpack(tmp_path, tmp_path / "folder")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="no packed model"):
        unpack(tmp_path, tmp_path / "folder")
