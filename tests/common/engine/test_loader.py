from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common.engine.loader import Llama3RopeScaling, load_architecture, load_weights
from common.errors import ModelLoadError
from common.model_store import ModelFiles
from support.oracles import gguf_oracle
from support.tiny_gguf import make_tiny_gguf
from support.tiny_models import make_tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _oracle_tensors(model: torch.nn.Module, *, tied: bool) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].is_contiguous(), name
        assert torch.equal(found[name], tensor), name


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny")


# -- Hugging Face folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_embeddings": True},
        {"attention_bias": True},
        {"shards": 3},
        {"layers": 11, "hidden": 48, "heads": 6, "kv_heads": 1, "head_dim": 8, "ffn": 40, "vocab": 300},
        {"dtype": torch.bfloat16, "kv_heads": 4},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_agrees_with_transformers(tmp_path: Path, shape: dict[str, Any], dtype: torch.dtype) -> None:
    folder = make_tiny_model(tmp_path, seed=3, **shape)
    architecture, tensors = load_weights(folder, dtype)
    oracle = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    _assert_equal(tensors, _oracle_tensors(oracle, tied=architecture.tie_embeddings))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == architecture.tensor_shapes()


def test_architecture_of_a_folder(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3, context=4096)
    found = load_architecture(folder)
    assert (found.family, found.num_layers, found.hidden_size, found.num_heads, found.num_kv_heads) == ("llama", 2, 64, 4, 2)
    assert (found.head_dim, found.ffn_size, found.vocab_size, found.context_tokens) == (16, 128, 384, 4096)
    assert (found.rope_theta, found.rms_norm_eps, found.tie_embeddings, found.attention_bias) == (5e5, 1e-5, False, False)
    assert found.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)


def test_newer_configs_keep_rope_in_one_table(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    config["rope_parameters"] = {"rope_theta": 123.0, "rope_type": "default"}
    (tiny / "config.json").write_text(json.dumps(config))
    assert (load_architecture(tiny).rope_theta, load_architecture(tiny).rope_scaling) == (123.0, None)


def test_llama3_scaling_agrees_with_transformers() -> None:
    config = LlamaConfig(
        hidden_size=128 * 4,
        num_attention_heads=4,
        max_position_embeddings=131_072,
        rope_parameters={**LLAMA3, "rope_theta": 5e5},
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    plain = [5e5 ** (-2 * pair / 128) for pair in range(64)]
    ours = torch.tensor([frequency / scaling.slowdown(frequency) for frequency in plain])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    assert 1.0 < scaling.slowdown(plain[31]) < 8.0  # the smooth part is there to be compared


def test_mistral_without_a_window_is_the_same_model(tiny: Path) -> None:
    _, expected = load_weights(tiny, torch.float32)
    _edit_config(tiny, architectures=["MistralForCausalLM"], sliding_window=None)
    _assert_equal(load_weights(tiny, torch.float32)[1], expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": []}, "supported"),
        ({"architectures": "LlamaForCausalLM"}, "supported"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": 2}, "rope_scaling"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_heads"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
        ({"num_hidden_layers": 3}, r"lacks tensors: model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"unknown tensors: model\.layers\.1"),
        ({"intermediate_size": 96}, "mlp"),
        ({"attention_bias": True}, r"lacks tensors: .*bias"),
    ],
)
def test_folders_that_no_model_here_can_run_are_refused_by_name(tiny: Path, changes: dict[str, Any], named: str) -> None:
    _edit_config(tiny, **changes)
    with pytest.raises(ModelLoadError, match=named):
        load_weights(tiny, torch.float32)


def test_a_tied_matrix_stored_twice_is_taken_once(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, tie_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert "lm_head.weight" not in load_weights(folder, torch.float32)[1]


def test_integer_weights_are_refused(tiny: Path) -> None:
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(tensors, tiny / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight is torch\.int8"):
        load_weights(tiny, torch.float32)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "sharded", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "model-00001-of-00002.safetensors", outside)
    for name in ("../outside.safetensors", str(outside), "model.bin", 7):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], "model.norm.weight": name}}))
        with pytest.raises(ModelLoadError, match="points outside"):
            load_weights(folder, torch.float32)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ModelLoadError):
            load_weights(folder, torch.float32)
    index.write_text(json.dumps(content))
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="model-00002"):
        load_weights(folder, torch.float32)
    shard.unlink()
    with pytest.raises(ModelLoadError, match="model-00002"):
        load_weights(folder, torch.float32)


def test_absent_files_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="pdserve pull"):
        load_weights(tmp_path / "absent", torch.float32)
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"neither model\.safetensors nor"):
        load_weights(tiny, torch.float32)
    (tiny / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_weights(tiny, torch.float32)


# -- GGUF --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": True}, {"attention_bias": True}, {"heads": 6, "kv_heads": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_holds_what_the_folder_holds(tmp_path: Path, shape: dict[str, Any], dtype: torch.dtype) -> None:
    folder = make_tiny_model(tmp_path / "tiny", **shape)
    path = make_tiny_gguf(folder, tmp_path / "model.gguf")
    architecture, tensors = load_weights(path, dtype)
    expected_architecture, expected = load_weights(folder, dtype)
    _assert_equal(tensors, expected)
    assert architecture.rms_norm_eps == pytest.approx(1e-5, rel=1e-6)  # stored as a 32 bit float
    for field in architecture.__slots__:
        if field != "rms_norm_eps":
            assert getattr(architecture, field) == getattr(expected_architecture, field)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.BF16])
def test_gguf_dequantises_each_row(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    _, tensors = load_weights(make_tiny_gguf(folder, tmp_path / "model.gguf", quantisation=kind), torch.float32)
    for name, tensor in load_file(folder / "model.safetensors").items():
        expected = tensor.numpy()
        if tensor.ndim == 2:  # blocks lie within rows, so that the order of rows does not matter to the result
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
        np.testing.assert_array_equal(tensors[name].numpy(), expected, err_msg=name)


def test_gguf_tensors_are_copies_that_may_be_written(tmp_path: Path, tiny: Path) -> None:
    path = make_tiny_gguf(tiny, tmp_path / "model.gguf")
    before = path.read_bytes()
    for tensor in load_weights(path, torch.float32)[1].values():
        tensor.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_scaling_is_recognised_by_its_factors(tmp_path: Path, factor: float) -> None:
    folder = make_tiny_model(tmp_path / "tiny", head_dim=64, rope_theta=5e5)
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters={**LLAMA3, "factor": factor, "rope_theta": 5e5}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = np.array([5e5 ** (-2 * pair / 64) / float(scaled[pair]) for pair in range(32)])
    path = make_tiny_gguf(folder, tmp_path / "model.gguf", rope_factors=factors)
    assert load_architecture(path).rope_scaling == Llama3RopeScaling(pytest.approx(factor, rel=1e-5), 1.0, 4.0, 8192)
    _assert_equal(load_weights(path, torch.float32)[1], load_weights(folder, torch.float32)[1])
    odd = make_tiny_gguf(folder, tmp_path / "odd.gguf", rope_factors=np.linspace(1.0, factor, 32))
    with pytest.raises(ModelLoadError, match="rope_freqs"):
        load_architecture(odd)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"architecture": "qwen2"}, "'qwen2'; supported are llama"),
        ({"drop": ("blk.1.ffn_up.weight",)}, r"lacks tensors: model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"drop": ("token_embd.weight",)}, "token_embd"),
        ({"extra": {"model.layers.0.mystery.weight": np.zeros(4, np.float32)}}, "unknown tensors: .*mystery"),
        ({"extra": {"model.norm.weight": np.zeros(4, np.float32)}}, r"model\.norm\.weight has shape \(4,\)"),
        ({"settings": {"llama.expert_count": 8}}, "expert_count"),
        ({"settings": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
        ({"settings": {"llama.rope.dimension_count": 8}}, "dimension_count"),
        ({"settings": {"llama.attention.sliding_window": 4096}}, "sliding_window"),
    ],
)
def test_gguf_files_that_no_model_here_can_run_are_refused_by_name(
    tiny: Path, tmp_path: Path, arguments: dict[str, Any], named: str
) -> None:
    path = make_tiny_gguf(tiny, tmp_path / "model.gguf", **arguments)
    with pytest.raises(ModelLoadError, match=named):
        load_weights(path, torch.float32)


def test_transformers_reads_the_same_from_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, that of transformers, and the oracle that holds the default model's file against ours (`test_parity`)."""
    # Transformers asks for a further library before it reads GGUF, and then does without it.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda *_: True)
    folder = make_tiny_model(tmp_path / "tiny", hidden=96, heads=6, kv_heads=3, layers=3, tie_embeddings=True)
    file = make_tiny_gguf(folder, tmp_path / "model.gguf", quantisation=GGMLQuantizationType.Q4_1)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = _oracle_tensors(theirs, tied=True)
    _assert_equal(load_weights(file, torch.float32)[1], expected)
    _assert_equal(_oracle_tensors(gguf_oracle(file), tied=True), expected)


@pytest.mark.model
def test_the_architecture_of_smollm2(smollm2: ModelFiles) -> None:
    architecture = load_architecture(smollm2.path)
    assert (architecture.num_layers, architecture.num_heads, architecture.num_kv_heads) == (30, 9, 3)
    assert (architecture.rope_theta, architecture.context_tokens, architecture.tie_embeddings) == (100_000.0, 8192, True)
