"""Models of a known shape with random weights, made where they are to be: for benchmarks on machines that hold no model.

    random:llama-3-8b        random:qwen3-30b-a3b:7        name, and perhaps a seed

Same name and seed, same weights; on a GPU the large ones are drawn there, and are others than on a CPU. They are scaled so that
hidden states keep their size from layer to layer: what comes out is no text, but as costly as text, and finite.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from common.engine.loader.architecture import Llama3RopeScaling, ModelArchitecture
from common.errors import ModelLoadError

PREFIX = "random:"
DRAWN_ON_HOST = 200_000_000  # weights: so few are the same on every device
_LLAMA_3_8B = ModelArchitecture(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=14_336,
    vocab_size=128_256,
    rope_theta=500_000.0,
    rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
    rms_norm_eps=1e-5,
    context_tokens=131_072,
    tie_embeddings=False,
    attention_bias=False,
)
# The others by what sets them apart from it.
_QWEN3_30B_A3B = replace(
    _LLAMA_3_8B,
    family="qwen3",
    num_layers=48,
    hidden_size=2048,
    num_kv_heads=4,
    ffn_size=768,
    vocab_size=151_936,
    rope_theta=1_000_000.0,
    rope_scaling=None,
    rms_norm_eps=1e-6,
    context_tokens=40_960,
    num_experts=128,
    experts_per_token=8,
)
_SMOLLM2_135M = replace(
    _LLAMA_3_8B,
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    vocab_size=49_152,
    rope_theta=100_000.0,
    rope_scaling=None,
    context_tokens=8192,
    tie_embeddings=True,
)
_TOY = replace(
    _SMOLLM2_135M, num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=128, vocab_size=512
)
SHAPES = {
    "llama-3-8b": _LLAMA_3_8B,
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "smollm2-135m": _SMOLLM2_135M,
    "toy": _TOY,
    "toy-mixture": replace(_TOY, family="qwen3", ffn_size=32, num_experts=8, experts_per_token=2),
}


def is_random(source: str) -> bool:
    return source.startswith(PREFIX)


def read_architecture(source: str) -> ModelArchitecture:
    return _parse(source)[0]


def make_weights(source: str, dtype: torch.dtype, device: torch.device) -> tuple[ModelArchitecture, dict[str, torch.Tensor]]:
    architecture, seed = _parse(source)
    wanted_on, wanted_as = device, dtype
    if sum(math.prod(shape) for shape in architecture.tensor_shapes().values()) <= DRAWN_ON_HOST:
        device, dtype = torch.device("cpu"), torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in architecture.tensor_shapes().items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name == "model.embed_tokens.weight":
            # Where the embedding gives the logits as well, its size is that of the head's rows.
            tensor.normal_(0.0, 3.0 / math.sqrt(shape[1]) if architecture.tie_embeddings else 1.0, generator=generator)
        else:
            tensor.normal_(0.0, 1.0 / math.sqrt(shape[-1]), generator=generator)
        weights[name] = tensor.to(wanted_on, wanted_as)
    return architecture, weights


def _parse(source: str) -> tuple[ModelArchitecture, int]:
    name, _, seed = source.removeprefix(PREFIX).partition(":")
    shape = SHAPES.get(name)
    if shape is None or not (seed == "" or seed.isdecimal()):
        raise ModelLoadError(
            f"{source!r} is not random:NAME or random:NAME:SEED with a NAME of {', '.join(SHAPES)}", param="source"
        )
    return shape, int(seed or 0)
