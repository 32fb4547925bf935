"""Who has what: every part of a model is somewhere, and nothing is had twice that must be had once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.config import ParallelConfig
from common.engine.block_matrix import BlockMatrix
from common.engine.loader import ModelArchitecture
from common.engine.parallel.share import Share, divide, shares_of
from common.errors import ConfigError


def model(
    layers: int, kv_heads: int, group: int, ffn: int, vocab: int, *, tied: bool = True, biased: bool = False
) -> ModelArchitecture:
    return ModelArchitecture(
        "llama", layers, 24, kv_heads * group, kv_heads, 4, ffn, vocab, 10_000.0, None, 1e-5, 128, tied, biased
    )


def degrees(tensor: int, pipeline: int) -> ParallelConfig:
    return ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline)


models = st.builds(
    model,
    layers=st.integers(1, 9),
    kv_heads=st.integers(1, 7),
    group=st.integers(1, 4),
    ffn=st.sampled_from([8, 100, 128, 192, 200, 1000]),
    vocab=st.sampled_from([11, 130, 192, 500]),
    tied=st.booleans(),
    biased=st.booleans(),
)


@given(total=st.integers(1, 1000), parts=st.integers(1, 50))
def test_parts_are_consecutive_and_differ_by_one(total: int, parts: int) -> None:
    found = [divide(total, parts, index) for index in range(parts)]
    assert [number for part in found for number in part] == list(range(total))
    sizes = [len(part) for part in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@settings(max_examples=80, deadline=None)
@given(whole=models, tensor=st.integers(1, 7), pipeline=st.integers(1, 9), seed=st.integers(0, 100))
def test_the_shares_put_together_are_the_model(whole: ModelArchitecture, tensor: int, pipeline: int, seed: int) -> None:
    """Each tensor is rebuilt from what the ranks kept of it, by position, without a look at how it was divided."""
    assume(tensor <= min(whole.num_kv_heads, whole.ffn_size, whole.vocab_size) and pipeline <= whole.num_layers)
    shares = shares_of(whole, degrees(tensor, pipeline))
    assert [share.rank for share in shares] == list(range(tensor * pipeline))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in whole.tensor_shapes().items()}
    held: list[dict[str, torch.Tensor]] = []
    for share in shares:
        kept: dict[str, torch.Tensor] = {}
        for name, tensor_ in tensors.items():
            kept.update(share.keep(whole, name, tensor_))
        held.append(kept)
        local = share.architecture(whole)
        expected = {name: shape for name, shape in local.tensor_shapes().items() if _has(share, name)}
        if share.is_last:
            expected["lm_head.weight"] = (len(share.vocab), whole.hidden_size)
        if share.is_first:
            expected["model.embed_tokens.weight"] = (whole.vocab_size, whole.hidden_size)
        assert {name: tuple(tensor_.shape) for name, tensor_ in kept.items()} == expected
    for name, tensor_ in tensors.items():
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            stage = [share for share in shares if int(index) in share.layers]
            parts = [held[share.rank][f"model.layers.{int(index) - share.layers.start}.{rest}"] for share in stage]
            if "o_proj.bias" in name:
                assert torch.equal(sum(parts[1:], parts[0]), tensor_)
            elif "norm" in name:
                assert all(torch.equal(part, tensor_) for part in parts)
            else:
                dim = 1 if "o_proj" in name or "down_proj" in name else 0
                assert torch.equal(torch.cat(parts, dim), tensor_)
    head = tensors["model.embed_tokens.weight" if whole.tie_embeddings else "lm_head.weight"]
    assert torch.equal(torch.cat([held[share.rank]["lm_head.weight"] for share in shares if share.is_last]), head)


@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_blocks_of_weights_are_divided_like_the_weights(tensor: int) -> None:
    whole = ModelArchitecture("llama", 1, 192, 6, 3, 64, 192, 130, 10_000.0, None, 1e-5, 128, True, False)
    for share in shares_of(whole, degrees(tensor, 1)):
        for name, shape in whole.tensor_shapes().items():
            if len(shape) == 2:
                matrix = BlockMatrix.rounded(torch.randn(shape, generator=torch.Generator().manual_seed(len(name))))
                kept = share.keep(whole, name, matrix)
                expected = share.keep(whole, name, matrix.dequantised())
                assert kept.keys() == expected.keys()
                for part in kept:
                    assert torch.equal(kept[part].dequantised(), expected[part])


def _has(share: Share, name: str) -> bool:
    ends = {"model.embed_tokens.weight": share.is_first, "model.norm.weight": share.is_last, "lm_head.weight": share.is_last}
    return ends.get(name, True)


def test_the_default_model_on_two_shards() -> None:
    """9 heads in 3 groups: 6 and 3; columns in whole groups of 64."""
    whole = ModelArchitecture("llama", 30, 576, 9, 3, 64, 1536, 49152, 1e5, None, 1e-5, 8192, True, False)
    first, second = shares_of(whole, degrees(2, 1))
    assert (first.heads, second.heads) == (range(6), range(6, 9))
    assert (first.kv_heads, second.kv_heads) == (range(2), range(2, 3))
    assert (first.ffn, second.ffn) == (range(768), range(768, 1536))
    assert [share.layers for share in shares_of(whole, degrees(1, 4))] == [range(8), range(8, 16), range(16, 23), range(23, 30)]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "param"), [(4, 1, "tensor_parallel"), (3, 5, "pipeline_parallel"), (1, 64, "pipeline_parallel")]
)
def test_too_many_ranks_are_refused_by_name(tensor: int, pipeline: int, param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shares_of(model(4, 3, 3, 128, 100), degrees(tensor, pipeline))
    assert caught.value.param == param
