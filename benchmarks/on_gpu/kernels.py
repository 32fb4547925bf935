"""Kernels by themselves, at the shapes of Llama-3-8B and Qwen3-30B-A3B: attention over a paged pool, products, experts.

On a CPU the kernels of ours run only in Triton's interpreter; there the torch references take their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.on_gpu.report import Figure, Report
from benchmarks.on_gpu.timing import captured_seconds_of, seconds_of
from common.engine.attention import Span, create_attention, create_rows_attention
from common.engine.batch import SampleSpec
from common.engine.draw_settings import settings_of
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.engine.numerics import FastNumerics
from common.engine.quantisation import (
    WeightFormat,
    dequantise_fp8,
    dequantise_int4,
    quantise_fp8,
    quantise_int4,
    rounded_matrix,
)
from common.engine.sampler import sample
from common.types import KVLayout

BYTES_IN_ROTATION = 400 * 2**20  # of weights, several times what a cache holds
FA3_B1_8K_S = 15.7e-6
FUSED_MOE_64_S = 308e-6


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int
    long_context: int
    prompt: int
    matrices: tuple[tuple[int, int], ...]  # outputs, inputs
    experts: int
    hidden: int
    ffn: int
    experts_per_token: int
    vocab: int


_MATRICES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ON_GPU = Sizes(32, 8, 128, 32, 4096, 8192, 8192, _MATRICES, 128, 2048, 768, 8, 128_256)
TOY = Sizes(4, 2, 16, 2, 64, 128, 64, ((96, 64), (64, 128)), 8, 64, 32, 2, 500)


@torch.inference_mode()
def run_kernels(report: Report) -> None:
    sizes = ON_GPU if report.device == "cuda" else TOY
    attention(report, sizes)
    products(report, sizes)
    experts(report, sizes)
    draws(report, sizes)


def attention(report: Report, sizes: Sizes) -> None:
    device = torch.device(report.device)
    dtype = torch.bfloat16 if report.device == "cuda" else torch.float32
    layers = 4  # taken in turn, so that no cache holds what is read
    layout = KVLayout("m", "t", layers, sizes.kv_heads, sizes.head_dim, 16, str(dtype).removeprefix("torch."), False)
    blocks_needed = max(sizes.batch * sizes.context, sizes.long_context, sizes.prompt) // 16
    pool = KVPool(layout, FIRST_BLOCK + blocks_needed, device)
    pool.tensor.normal_()
    name = "fast"
    rows_attention = create_rows_attention(name, pool, sizes.heads)
    kv_bytes = 2 * sizes.kv_heads * sizes.head_dim * dtype.itemsize

    def decode_s(batch: int, context: int) -> float:
        tables = (FIRST_BLOCK + torch.randperm(batch * context // 16, device=device)).view(batch, -1)
        lengths = torch.full((batch,), context, device=device)
        queries = torch.randn(batch, sizes.heads, sizes.head_dim, device=device, dtype=dtype)
        plan = rows_attention.plan_rows(tables, lengths)
        return captured_seconds_of([lambda layer=layer: plan.attend(layer, queries) for layer in range(layers)], report.device)  # type: ignore[misc]

    seconds = decode_s(sizes.batch, sizes.context)
    read = sizes.batch * sizes.context * kv_bytes / seconds
    what = f"paged decode attention, {sizes.batch} x {sizes.context} ({name})"
    report.add(Figure("K1", what, seconds * 1e6, "us", read / 4.8e12, "4.8 TB/s (the card's own figure)", 0.75))
    report.add(Figure("K1", what, read / 1e12, "TB/s", read / report.roof.copy_bytes_per_s, "the measured copy"))
    seconds = decode_s(1, sizes.long_context)
    what = f"split-KV decode attention, 1 x {sizes.long_context} ({name})"
    report.add(Figure("K2", what, seconds * 1e6, "us", seconds / FA3_B1_8K_S, "15.7 us", 1.3, lower_is_better=True))
    backend = create_attention(name, pool, sizes.heads)
    tables = torch.arange(FIRST_BLOCK, FIRST_BLOCK + sizes.prompt // 16, device=device)[None]
    plan = backend.plan(tables, [Span(0, sizes.prompt, 0)])
    queries = torch.randn(sizes.prompt, sizes.heads, sizes.head_dim, device=device, dtype=dtype)
    seconds = seconds_of(lambda: plan.attend(0, queries), report.device)
    flops = 2 * sizes.heads * sizes.head_dim * sizes.prompt**2 / seconds
    what = f"causal prefill attention, {sizes.prompt} tokens ({name})"
    report.add(Figure("K3", what, flops / 1e12, "TFLOP/s", target=400))
    report.add(Figure("K3", what, seconds * 1e3, "ms", flops / report.roof.flops_per_s, "the measured product"))


def products(report: Report, sizes: Sizes) -> None:
    device = report.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for num_rows in (1, 16, 64):
        totals: dict[str, float] = {}
        for outputs, inputs in sizes.matrices:
            copies = max(1, BYTES_IN_ROTATION // (outputs * inputs * 2)) if device == "cuda" else 2
            rows = torch.randn(num_rows, inputs, device=device, dtype=dtype)
            weights = [torch.randn(outputs, inputs, device=device, dtype=dtype) / inputs**0.5 for _ in range(copies)]
            plain = [partial(F.linear, rows, weight) for weight in weights]
            seconds = captured_seconds_of(plain, device)
            totals["16 bits"] = totals.get("16 bits", 0.0) + seconds
            read = outputs * inputs * dtype.itemsize / seconds
            what = f"library product, {num_rows} x {inputs} -> {outputs}"
            report.add(Figure("K4", what, seconds * 1e6, "us", read / report.roof.copy_bytes_per_s, "the measured copy"))
            for weight_format in (WeightFormat.INT4, WeightFormat.INT8, WeightFormat.FP8):
                works = [rounded_work(weight, rows, weight_format, device) for weight in weights]
                seconds = captured_seconds_of(works, device)
                totals[weight_format.value] = totals.get(weight_format.value, 0.0) + seconds
        for weight_format in (WeightFormat.INT4, WeightFormat.INT8, WeightFormat.FP8):
            ratio = totals["16 bits"] / totals[weight_format.value]
            target = 2.5 if weight_format is WeightFormat.INT4 and num_rows <= 16 else None
            what = f"{weight_format.value} against the library in 16 bits, {num_rows} rows, all four matrices"
            report.add(Figure("K4", what, ratio, "x", target=target))


def rounded_work(weight: torch.Tensor, rows: torch.Tensor, weight_format: WeightFormat, device: str) -> Callable[[], object]:
    if device == "cuda":
        from common.engine.triton_kernels.products import rounded_product

        product = rounded_product(weight, None, weight_format)
        return lambda: product(rows)
    match weight_format:
        case WeightFormat.INT4:
            packed, scales = quantise_int4(weight)
            return lambda: F.linear(rows, dequantise_int4(packed, scales, weight.shape[1]))
        case WeightFormat.FP8:
            narrow, scales = quantise_fp8(weight)
            return lambda: F.linear(rows, dequantise_fp8(narrow, scales))
        case _:
            rounded = rounded_matrix(weight, weight_format)
            return lambda: F.linear(rows, rounded)


def experts(report: Report, sizes: Sizes) -> None:
    device = report.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = 2
    works = []
    for _ in range(layers):
        gate_up = torch.randn(sizes.experts, 2 * sizes.ffn, sizes.hidden, device=device, dtype=dtype) / sizes.hidden**0.5
        down = torch.randn(sizes.experts, sizes.hidden, sizes.ffn, device=device, dtype=dtype) / sizes.ffn**0.5
        if device == "cuda":
            from common.engine.triton_kernels.products import experts_product

            works.append(experts_product(gate_up, down))
        else:
            works.append(FastNumerics().experts(gate_up, down))
    for num_rows, known_s in ((1, 38e-6), (8, 164e-6), (64, FUSED_MOE_64_S), (2048, 497e-6)):
        if device == "cpu" and num_rows > 8:
            continue
        rows = torch.randn(num_rows, sizes.hidden, device=device, dtype=dtype)
        weights, expert_ids = torch.rand(num_rows, sizes.experts, device=device).topk(sizes.experts_per_token)
        seconds = captured_seconds_of([partial(work, rows, expert_ids, weights) for work in works], device)
        touched = int(expert_ids.unique().numel())
        read = touched * 3 * sizes.ffn * sizes.hidden * dtype.itemsize / seconds
        what = f"experts of a layer, {num_rows} rows, {touched} of {sizes.experts} touched"
        target = 1.15 if num_rows == 64 else None
        of = f"{known_s * 1e6:.0f} us, a server's fused layer"
        report.add(Figure("K5", what, seconds * 1e6, "us", seconds / known_s, of, target, lower_is_better=True))
        report.add(Figure("K5", what, read / 1e12, "TB/s", read / report.roof.copy_bytes_per_s, "the measured copy"))


def draws(report: Report, sizes: Sizes) -> None:
    """A step's tokens from its logits, none of which is sorted; against the best token of each row, which every step finds."""
    device = report.device
    for num_rows in (1, 32, 256) if device == "cuda" else (2,):
        logits = torch.randn(num_rows, sizes.vocab, device=device) * 4
        read = num_rows * sizes.vocab * 4
        best_s = captured_seconds_of([lambda logits=logits: logits.max(dim=-1)], device)  # type: ignore[misc]
        what = f"draws from {num_rows} x {sizes.vocab} logits"
        report.add(
            Figure("K6", f"{what}: best", best_s * 1e6, "us", read / best_s / report.roof.copy_bytes_per_s, "the measured copy")
        )
        for name, (top_k, top_p) in {"plain": (0, 1.0), "top-p": (0, 0.95), "top-k and top-p": (50, 0.95)}.items():
            specs = [SampleSpec(row, 7 + row, 0, 0.8, top_k, top_p, 0.0, None) for row in range(num_rows)]
            seconds = captured_seconds_of([draw_work(logits, specs, device)], device)
            report.add(Figure("K6", f"{what}: {name}", seconds * 1e6, "us", seconds / best_s, "the best alone"))


def draw_work(logits: torch.Tensor, specs: list[SampleSpec], device: str) -> Callable[[], object]:
    rows = range(len(specs))
    if device == "cpu":
        return lambda: sample(logits, specs, rows)
    from common.engine.triton_kernels.row_draws import TritonRowDraws

    settings = torch.from_numpy(settings_of(specs, rows)).to(device)
    top_k, top_p = specs[0].top_k > 0, specs[0].top_p < 1.0
    return lambda: TritonRowDraws().draw(logits, settings, any_top_k=top_k, any_top_p=top_p)
