"""log(sum(exp(logits))) of rows, without a row of probabilities: what log-probabilities need.

    program (row, chunk)   best of the chunk, sum of exp(logit - best)
    program (row)          chunks in order -> best + log(sum)

In fp64 where sums are concerned, chunk after chunk; a row depends on itself alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 4096


@triton.jit
def chunk_sum_kernel(logits, peaks, sums, stride, vocab, CHUNK: tl.constexpr):
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf"))
    peak = tl.max(values, 0)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(peaks + row * chunks + chunk, peak)
    tl.store(sums + row * chunks + chunk, tl.sum(tl.exp(values - anchor).to(tl.float64), 0))


@triton.jit
def log_sum_kernel(peaks, sums, output, chunks, CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    known = chunk < chunks
    peak_of = tl.load(peaks + row * chunks + chunk, mask=known, other=float("-inf")).to(tl.float64)
    peak = tl.max(peak_of, 0)
    total = tl.sum(tl.load(sums + row * chunks + chunk, mask=known, other=0.0) * tl.exp(peak_of - peak), 0)
    tl.store(output + row, (peak + tl.log(total)).to(tl.float32))


def log_sums(logits: torch.Tensor, chunk: int = _CHUNK) -> torch.Tensor:
    """[rows], fp32, of fp32 logits [rows, vocab] with neighbouring values."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, chunk)
    peaks = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    sums = torch.empty(rows, chunks, dtype=torch.float64, device=logits.device)
    output = torch.empty(rows, dtype=torch.float32, device=logits.device)
    chunk_sum_kernel[(rows, chunks)](logits, peaks, sums, logits.stride(0), vocab, CHUNK=chunk, num_warps=8)
    log_sum_kernel[(rows,)](peaks, sums, output, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1)
    return output


def log_sums_reference(logits: torch.Tensor, chunk: int = _CHUNK) -> torch.Tensor:
    return logits.double().logsumexp(dim=-1).float()
