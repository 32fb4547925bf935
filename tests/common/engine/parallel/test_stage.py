"""Shares of a model compute what the whole does: logits and every byte of KV, at all degrees, by torch and natively.

Real shares with real sockets between them, a thread each. The oracle is an engine of one process, itself held against
transformers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from common.config import EngineConfig, ParallelConfig, pdserve_home
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.loader import load_architecture
from common.engine.native.choice import choose_library
from common.engine.weights_choice import choose_weights
from support.ranks import thread_group
from support.tiny_gemma import make_tiny_gemma
from support.tiny_gguf import make_tiny_gguf
from support.tiny_models import make_tiny_model

TOKENS = torch.randint(3, 380, (90,), generator=torch.Generator().manual_seed(5)).tolist()
DEGREES = [(2, 1), (3, 1), (1, 3), (2, 2)]
SLICES = [(0, 40), (40, 41), (41, 90)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three KV heads, four layers, biases: nothing divides evenly by two."""
    return make_tiny_model(
        tmp_path_factory.mktemp("llama"), seed=4, layers=4, heads=6, kv_heads=3, ffn=200, attention_bias=True, tie_embeddings=True
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wide"), seed=6, layers=4, heads=6, kv_heads=3, head_dim=64, ffn=200)


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    whole = make_tiny_model(folder / "whole", seed=6, layers=4, heads=6, kv_heads=3, head_dim=64, ffn=192, tie_embeddings=True)
    return make_tiny_gguf(whole, folder / "model.gguf", quantisation=GGMLQuantizationType.Q4_1)


def settings(**changes: object) -> EngineConfig:
    return EngineConfig(**{"device": "cpu", "dtype": "float32", "kernels": "torch", "kv_pool_tokens": 256, **changes})


def one_process(path: Path, config: EngineConfig) -> Engine:
    return build_engine(path, config, threads=1, model_digest="m", tokenizer_digest="t")


def native_library(config: EngineConfig, path: Path) -> str:
    architecture = load_architecture(path)
    weight_format = choose_weights(config, path, architecture, "cpu")
    dtype = getattr(torch, config.dtype)
    return choose_library(config, architecture, "cpu", dtype, weight_format, pdserve_home() / "kernels")


def steps() -> list[ScheduledBatch]:
    """Chunks of one sequence beside a second one that is one token behind."""
    mine, other = list(range(1, 7)), list(range(7, 13))
    return [
        ScheduledBatch(
            (
                SequenceSlice(TOKENS[first:end], first, mine),
                SequenceSlice(TOKENS[max(0, first - 1) : end - 1][::-1], max(0, first - 1), other),
            )
        )
        for first, end in SLICES
    ]


@pytest.mark.parametrize(("tensor", "pipeline"), DEGREES)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_shares_compute_what_the_whole_does(llama: Path, tensor: int, pipeline: int, exact: bool) -> None:
    config = settings(exact=exact)
    alone = one_process(llama, config)
    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=8)
    with thread_group(llama, parallel, config) as group:
        for batch in steps():
            expected = alone.runner.compute_all_logits(batch)
            got = group.all_logits(batch)
            if exact and tensor == 1:
                assert torch.equal(got, expected)  # stages, and parts of a step, change no bit
            else:
                torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
                assert torch.equal(got.argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(group.kv, alone.pool.tensor, rtol=1e-4, atol=1e-4)
        assert alone.pool.tensor[1:13].abs().sum() > 0


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_layer_is_told_of_when_all_ranks_have_stored_it(llama: Path, tensor: int, pipeline: int, kernels: str) -> None:
    """What is in the pool when a layer is told of is what is there in the end: it may be handed over while others compute."""
    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=8)
    config = settings(kernels=kernels)
    library = native_library(config, llama)
    with thread_group(llama, parallel, config, library=library) as group:
        for batch in steps():
            before, seen = group.kv.clone(), []
            group.all_logits(batch, lambda count: seen.append((count, group.kv[:, :count].clone())))  # noqa: B023
            assert [count for count, _ in seen] == [1, 2, 3, 4]
            for count, kv in seen:
                assert torch.equal(kv, group.kv[:, :count])
                assert not torch.equal(kv[:, -1], before[:, count - 1])


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (2, 2)])
@pytest.mark.parametrize(("kernels", "weights"), [("torch", "model"), ("native", "model"), ("native", "int8")])
def test_in_exact_mode_a_degree_gives_the_same_bits_however_work_is_cut(
    wide: Path, llama: Path, tensor: int, pipeline: int, kernels: str, weights: str
) -> None:
    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=8)
    config = settings(exact=True, kernels=kernels, weights=weights)
    path = llama if weights == "model" else wide  # whose groups of 64 are not divided
    library = native_library(config, path)
    assert bool(library) == (kernels == "native")
    with thread_group(path, parallel, config, library=library) as group:
        whole = group.all_logits(ScheduledBatch((SequenceSlice(TOKENS, 0, range(1, 7)),)))
        kv = group.kv[1:7].clone()
        rows = []
        for first, end in ((0, 7), (7, 8), (8, 50), (50, 90)):
            beside = SequenceSlice(TOKENS[first : first + 3], 0, range(13, 15))
            rows.append(group.all_logits(ScheduledBatch((beside, SequenceSlice(TOKENS[first:end], first, range(7, 13)))))[3:])
        assert torch.equal(torch.cat(rows), whole)
        assert torch.equal(group.kv[7:13], kv)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize(("dtype", "weights", "tolerance"), [("float32", "model", 3e-4), ("float32", "int8", 0.2)])
def test_native_shares_compute_what_the_native_whole_does(
    wide: Path, tensor: int, pipeline: int, dtype: str, weights: str, tolerance: float
) -> None:
    """In 8 bits too, whose groups of 64 inputs are never divided; there a last bit may move a rounding."""
    config = settings(kernels="native", dtype=dtype, weights=weights)
    library = native_library(config, wide)
    alone = one_process(wide, config)
    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=8)
    with thread_group(wide, parallel, config, library=library) as group:
        for batch in steps():
            expected = alone.runner.compute_all_logits(batch)
            got = group.all_logits(batch)
            if tensor == 1:
                assert torch.equal(got, expected)
            else:
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_shares_of_a_files_blocks_with_rounded_kv(in_blocks: Path, tensor: int, pipeline: int) -> None:
    config = settings(kernels="native", weights="file", kv_dtype="int8")
    library = native_library(config, in_blocks)
    alone = one_process(in_blocks, config)
    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=8)
    with thread_group(in_blocks, parallel, config, library=library) as group:
        for batch in steps():
            expected = alone.runner.compute_all_logits(batch)
            got = group.all_logits(batch)
            if tensor == 1:
                assert torch.equal(got, expected)
            else:
                # A last bit of a sum moves roundings of rows, as in 8 bits; other weights or KV would be as far as any answer.
                assert float((got - expected).square().mean().sqrt()) < 0.15 * float(expected.square().mean().sqrt())
        if tensor == 1:
            assert torch.equal(group.kv, alone.pool.tensor)


def test_gemma_divides_with_its_windows_and_norms(tmp_path: Path) -> None:
    path = make_tiny_gemma(tmp_path, kv_heads=2)
    config = settings()
    alone = one_process(path, config)
    for tensor, pipeline in ((2, 1), (1, 2), (2, 2)):
        parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=8)
        with thread_group(path, parallel, config) as group:
            for batch in steps():
                expected = alone.runner.compute_all_logits(batch)
                torch.testing.assert_close(group.all_logits(batch), expected, rtol=5e-4, atol=5e-4)
