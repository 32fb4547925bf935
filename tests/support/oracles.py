"""Models of transformers, an implementation that shares no code with ours, for tests to hold answers against."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

_LONG_LIST = 1000


@contextmanager
def without_random_weights() -> Iterator[None]:
    """For models whose weights are all loaded afterwards: making them up takes longer than that."""
    from transformers import PreTrainedModel

    with pytest.MonkeyPatch.context() as patch:
        for layer in (torch.nn.Linear, torch.nn.Embedding):
            patch.setattr(layer, "reset_parameters", lambda self: None)
        patch.setattr(PreTrainedModel, "init_weights", lambda self: None)
        yield


def _reader(file: Path) -> Any:
    """The library's reader, which makes an array of every entry of a vocabulary: that takes longer than all the tensors."""
    import gguf

    class WithoutLongLists(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type == gguf.GGUFValueType.ARRAY:
                kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
                if count > _LONG_LIST:
                    return self._size(gguf.GGUFValueType(kind), count, orig_offs + 12) + 12, [], [], []
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return found

        def _size(self, kind: gguf.GGUFValueType, count: int, start: int) -> int:
            if kind is not gguf.GGUFValueType.STRING:
                return count * int(self.gguf_scalar_to_np[kind]().nbytes)
            end = start
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", self.data, end)
                end += 8 + length
            return end - start

    return WithoutLongLists(file)


def gguf_oracle(file: Path) -> torch.nn.Module:
    """transformers' Llama with the tensors of a GGUF file, as the gguf library dequantises them."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = _reader(file)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        num_hidden_layers=field("block_count"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        max_position_embeddings=field("context_length"),
        vocab_size=int(next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight").shape[1]),
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_norm": "post_attention_layernorm",
    }
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        first, *rest = tensor.name.split(".")
        if first != "blk":
            weights[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[first] + ".weight"] = values
            continue
        layer, part, _ = rest
        if part in ("attn_q", "attn_k"):  # llama.cpp turns neighbouring dimensions, transformers those half a head apart
            split = (heads if part == "attn_q" else kv_heads, -1, 2, values.shape[1])
            values = values.view(split).transpose(1, 2).reshape(values.shape)
        weights[f"model.layers.{layer}.{names[part]}.weight"] = values
    with without_random_weights():
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (list(missing), list(unexpected)) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


def gguf_gemma_oracle(file: Path) -> torch.nn.Module:
    """transformers' Gemma 3 with the tensors of a GGUF file; its norms are stored there with the 1 that the model adds."""
    import gguf
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    reader = _reader(file)

    def field(name: str) -> Any:
        return reader.fields[f"gemma3.{name}"].contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = Gemma3TextConfig(
        num_hidden_layers=field("block_count"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=field("attention.key_length"),
        query_pre_attn_scalar=field("attention.key_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        sliding_window=field("attention.sliding_window"),
        max_position_embeddings=field("context_length"),
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
    )
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    with without_random_weights():
        model = Gemma3ForCausalLM(config)
    weights = {}
    for name, tensor in tensors.items():
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        first, *rest = name.split(".")
        if first == "blk":
            renamed = f"model.layers.{rest[0]}.{parts[rest[1]]}.weight"
        else:
            renamed = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[first] + ".weight"
        weights[renamed] = values - 1 if "norm" in renamed else values
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (list(missing), list(unexpected)) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()
