"""Draws tokens from rows of logits on the device, as `sampler` does on the host: the same filters, the same random number.

    survey    chunk's best, and whether something is not a number                            rows x chunks
    narrow    eight times: how much lies at or above each of 16 bounds; four bits of a key   rows x chunks
    weigh     how much of what is left lies in each chunk                                    rows x chunks
    pick      the chunk and in it the token where the cumulated weight passes u              rows

Nothing is sorted. Logits become keys, 32-bit numbers in the same order, and the key of the last token that a filter keeps is
found digit by digit: for top-k by counting, then for top-p by weight among what top-k kept. Of tokens with that very key the
first by id are kept, as many as it takes. Weights are exp((logit - best) / temperature) in fp64, a chunk is summed in one order,
chunks in another; so a row's draw depends on that row alone, and differs from the host's only where fp64 rounding decides.

u is number `position` of Philox 4x64 under the key (seed, choice), bit for bit `sampler.uniform`. Launches depend on shapes, and
on whether any row has top-k or top-p; not on values. Many launches of little work: they are meant to be captured.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl

from common.engine import draw_settings
from common.engine.batch import SampleSpec
from common.engine.sampler import candidates, uniform

CHUNK = 1024
_WARPS = 8
_DIGITS = 8
BROKEN = -1
"""Instead of a token: the best logit is not finite, or something is not a number."""
NO_KEY = tl.constexpr(-1)
ROW, SEED, CHOICE, POSITION, TOP_K, TEMPERATURE, TOP_P, MIN_P = (
    tl.constexpr(place) for place in range(draw_settings.NUM_SETTINGS)
)


@triton.jit
def setting(settings, row, PLACE: tl.constexpr):
    return tl.load(settings + row * 8 + PLACE)


@triton.jit
def real_setting(settings, row, PLACE: tl.constexpr):
    return tl.load(settings + row * 8 + PLACE).to(tl.float64, bitcast=True)


@triton.jit
def key_of(logits):
    """In the order of the logits, from 0; both zeros have one key."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def logit_of(key):
    bits = (key - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(logits, best, temperature):
    return tl.exp((logits.to(tl.float64) - best) / temperature)


@triton.jit
def chunk_of(logits, settings, row, chunk, stride, vocab, CHUNK: tl.constexpr):
    """A chunk's logits, -inf beyond the vocabulary, with their token ids."""
    token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
    source = setting(settings, row, ROW) * stride
    return tl.load(logits + source + token_ids, mask=token_ids < vocab, other=float("-inf")), token_ids


@triton.jit
def best_of(peaks, row, chunks, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(peaks + row * chunks + chunk, mask=chunk < chunks, other=float("-inf")), 0).to(tl.float64)


@triton.jit
def survey_kernel(logits, settings, peaks, places, broken, stride, vocab, CHUNK: tl.constexpr):
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    values, token_ids = chunk_of(logits, settings, row, chunk, stride, vocab, CHUNK)
    peak = tl.max(tl.where(values == values, values, float("-inf")), 0)
    at = row * chunks + chunk
    tl.store(peaks + at, peak)
    tl.store(places + at, tl.min(tl.where(values == peak, token_ids, vocab), 0))
    tl.store(broken + at, tl.max((values != values).to(tl.int32), 0))


@triton.jit
def settled(sums, row, chunks, prefix, above, target, tie_key, tie_weight, shift, CHUNKS: tl.constexpr):
    """One more digit: the highest bound at or above which there is `target`. Returns the longer prefix, and what lies above all
    that begins with it. What ties weigh is in no chunk's sums, for of them only some count."""
    chunk, digit = tl.arange(0, CHUNKS), tl.arange(0, 16)
    parts = tl.load(sums + (row * chunks + chunk)[:, None] * 16 + digit[None, :], mask=(chunk < chunks)[:, None], other=0.0)
    bounds = prefix + (digit.to(tl.int64) << shift)
    reached = tl.sum(parts, 0) + tl.where(bounds <= tie_key, tie_weight, 0.0)
    chosen = tl.sum(((reached >= target) & (digit > 0)).to(tl.int64), 0)
    next_above = tl.sum(tl.where(digit == chosen + 1, reached, 0.0), 0)
    return prefix + (chosen << shift), tl.where(chosen == 15, above, next_above), tl.sum(tl.where(digit == 0, reached, 0.0), 0)


@triton.jit
def found_by(
    sums, prefixes, above, targets, row, rows, chunks, tie_key, tie_weight, share, PASS: tl.constexpr, CHUNKS: tl.constexpr
):
    """What pass number PASS has found, from its sums and from what was known before it: prefix, what is above it, target. Before
    the first pass of top-p the target is not known: it is a share of everything."""
    prefix = tl.load(prefixes + PASS * rows + row)
    over = tl.load(above + PASS * rows + row)
    target = tl.load(targets + PASS * rows + row)
    if PASS == 0:
        if share >= 0.0:
            chunk = tl.arange(0, CHUNKS)
            everything = tl.load(sums + (row * chunks + chunk) * 16, mask=chunk < chunks, other=0.0)
            target = share * (tl.sum(everything, 0) + tie_weight)
    prefix, over, _ = settled(sums, row, chunks, prefix, over, target, tie_key, tie_weight, 28 - 4 * PASS, CHUNKS)
    return prefix, over, target


@triton.jit
def kept_by_top_k(
    settings,
    k_sums,
    k_prefixes,
    k_above,
    k_targets,
    row,
    rows,
    chunks,
    vocab,
    best,
    temperature,
    ANY_TOP_K: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The key of the last token that top-k keeps, how many with that key it keeps, and what they weigh. NO_KEY: it keeps all."""
    top_k = setting(settings, row, TOP_K)
    key = tl.full([], NO_KEY, tl.int64)
    count = tl.full([], 0, tl.int64)
    weight = tl.full([], 0.0, tl.float64)
    if ANY_TOP_K:
        if (top_k > 0) & (top_k < vocab):
            key, over, _ = found_by(k_sums, k_prefixes, k_above, k_targets, row, rows, chunks, NO_KEY, 0.0, -1.0, 7, CHUNKS)
            count = top_k - over.to(tl.int64)
            weight = count.to(tl.float64) * weight_of(logit_of(key), best, temperature)
    return key, count, weight


@triton.jit
def narrow_kernel(
    logits,
    settings,
    peaks,
    k_sums,
    k_prefixes,
    k_above,
    k_targets,
    sums_before,
    sums,
    prefixes,
    above,
    targets,
    stride,
    vocab,
    PASS: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    ANY_TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row, chunk, rows, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    top_k, top_p = setting(settings, row, TOP_K), real_setting(settings, row, TOP_P)
    temperature = real_setting(settings, row, TEMPERATURE)
    if BY_WEIGHT:
        wanted = (top_p < 1.0) & (temperature > 0.0)
    else:
        wanted = (top_k > 0) & (top_k < vocab) & (temperature > 0.0)
    if wanted:
        values, token_ids = chunk_of(logits, settings, row, chunk, stride, vocab, CHUNK)
        keys = tl.where(token_ids < vocab, key_of(values), NO_KEY)
        tie_key = tl.full([], NO_KEY, tl.int64)
        tie_weight = tl.full([], 0.0, tl.float64)
        if BY_WEIGHT:
            best = best_of(peaks, row, chunks, CHUNKS)
            tie_key, _, tie_weight = kept_by_top_k(
                settings, k_sums, k_prefixes, k_above, k_targets, row, rows, chunks, vocab, best, temperature, ANY_TOP_K, CHUNKS
            )
            weights = tl.where(keys > tie_key, weight_of(values, best, temperature), 0.0)
            share = top_p
        else:
            weights = tl.where(keys >= 0, 1.0, 0.0).to(tl.float64)
            share = tl.full([], -1.0, tl.float64)
        if PASS == 0:
            prefix = tl.full([], 0, tl.int64)
            over = tl.full([], 0.0, tl.float64)
            target = top_k.to(tl.float64)
        else:
            prefix, over, target = found_by(
                sums_before, prefixes, above, targets, row, rows, chunks, tie_key, tie_weight, share, PASS - 1, CHUNKS
            )
        if chunk == 0:
            tl.store(prefixes + PASS * rows + row, prefix)
            tl.store(above + PASS * rows + row, over)
            tl.store(targets + PASS * rows + row, target)
        out = sums + (row * chunks + chunk) * 16
        digit = tl.arange(0, 16)
        bounds = prefix + (digit.to(tl.int64) << (28 - 4 * PASS))
        above_bounds = keys[None, :] >= bounds[:, None]
        tl.store(out + digit, tl.sum(tl.where(above_bounds, weights[None, :], 0.0), 1))


@triton.jit
def weigh_kernel(
    logits,
    settings,
    peaks,
    k_sums,
    k_prefixes,
    k_above,
    k_targets,
    p_sums,
    p_prefixes,
    p_above,
    p_targets,
    last_keys,
    last_counts,
    masses,
    ties,
    stride,
    vocab,
    ANY_TOP_K: tl.constexpr,
    ANY_TOP_P: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row, chunk, rows, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    temperature = real_setting(settings, row, TEMPERATURE)
    if temperature > 0.0:
        values, token_ids = chunk_of(logits, settings, row, chunk, stride, vocab, CHUNK)
        keys = tl.where(token_ids < vocab, key_of(values), NO_KEY)
        best = best_of(peaks, row, chunks, CHUNKS)
        last, count, tie_weight = kept_by_top_k(
            settings, k_sums, k_prefixes, k_above, k_targets, row, rows, chunks, vocab, best, temperature, ANY_TOP_K, CHUNKS
        )
        top_p = real_setting(settings, row, TOP_P)
        if ANY_TOP_P:
            if top_p < 1.0:
                key, over, target = found_by(
                    p_sums, p_prefixes, p_above, p_targets, row, rows, chunks, last, tie_weight, top_p, 7, CHUNKS
                )
                each = weight_of(logit_of(key), best, temperature)
                missing = tl.where(each > 0.0, (target - over) / each, 1.0)
                needed = tl.maximum(tl.minimum(tl.ceil(missing), vocab.to(tl.float64)).to(tl.int64), 1)
                count = tl.where(key == last, tl.minimum(needed, count), needed)
                last = key
        weights = weight_of(values, best, temperature)
        weights = tl.where(weights < real_setting(settings, row, MIN_P), 0.0, weights)
        at = row * chunks + chunk
        if chunk == 0:
            tl.store(last_keys + row, last)
            tl.store(last_counts + row, count)
        tl.store(masses + at, tl.sum(tl.where(keys > last, weights, 0.0), 0))
        tl.store(ties + at, tl.sum((keys == last).to(tl.int64), 0))


@triton.jit
def uniform_of(seed, choice, position):
    """The first word of Philox 4x64-10 for (position + 1, 0, 0, 0) under the key (seed, choice), as a number in [0, 1)."""
    first_factor = tl.full([], 0xD2E7470EE14C6C93, tl.uint64)
    second_factor = tl.full([], 0xCA5A826395121157, tl.uint64)
    x0 = (position + 1).to(tl.uint64)
    x1 = tl.full([], 0, tl.uint64)
    x2 = tl.full([], 0, tl.uint64)
    x3 = tl.full([], 0, tl.uint64)
    k0 = seed.to(tl.uint64, bitcast=True)
    k1 = choice.to(tl.uint64, bitcast=True)
    for _ in tl.static_range(10):
        first_high, first_low = tl.umulhi(first_factor, x0), first_factor * x0
        second_high, second_low = tl.umulhi(second_factor, x2), second_factor * x2
        x0 = second_high ^ x1 ^ k0
        x1 = second_low
        x2 = first_high ^ x3 ^ k1
        x3 = first_low
        k0 = k0 + tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
        k1 = k1 + tl.full([], 0xBB67AE8584CAA73B, tl.uint64)
    return (x0 >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def pick_kernel(
    logits,
    settings,
    peaks,
    places,
    broken,
    last_keys,
    last_counts,
    masses,
    ties,
    drawn,
    chunks,
    stride,
    vocab,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0)
    all_chunks = tl.arange(0, CHUNKS)
    known = all_chunks < chunks
    at = row * chunks + all_chunks
    peak_of = tl.load(peaks + at, mask=known, other=float("-inf"))
    peak = tl.max(peak_of, 0)
    bad = tl.max(tl.load(broken + at, mask=known, other=0), 0) > 0
    bad = bad | (peak == float("inf")) | (peak == float("-inf"))
    temperature = real_setting(settings, row, TEMPERATURE)
    token = tl.min(tl.where(peak_of == peak, tl.load(places + at, mask=known, other=vocab), vocab), 0)
    if temperature > 0.0:
        best = peak.to(tl.float64)
        last, count = tl.load(last_keys + row), tl.load(last_counts + row)
        min_p = real_setting(settings, row, MIN_P)
        each = tl.where(last >= 0, weight_of(logit_of(last), best, temperature), 0.0)
        each = tl.where(each < min_p, 0.0, each)
        in_chunk = tl.load(ties + at, mask=known, other=0)
        before = tl.cumsum(in_chunk, 0) - in_chunk
        kept = tl.minimum(tl.maximum(count - before, 0), in_chunk)
        mass = tl.load(masses + at, mask=known, other=0.0) + kept.to(tl.float64) * each
        cumulated = tl.cumsum(mass, 0)
        total = tl.max(cumulated, 0)
        point = total * uniform_of(setting(settings, row, SEED), setting(settings, row, CHOICE), setting(settings, row, POSITION))
        # Where rounding leaves no chunk beyond the point, the last one that holds something is meant.
        last_chunk = tl.max(tl.where(mass > 0.0, all_chunks, 0), 0)
        chosen = tl.min(tl.where((cumulated > point) & (mass > 0.0), all_chunks, last_chunk), 0)
        is_chosen = all_chunks == chosen
        start = tl.sum(tl.where(is_chosen, cumulated - mass, 0.0), 0)
        left = tl.where(last >= 0, tl.sum(tl.where(is_chosen, kept, 0), 0), 0)
        values, token_ids = chunk_of(logits, settings, row, chosen, stride, vocab, CHUNK)
        keys = tl.where(token_ids < vocab, key_of(values), NO_KEY)
        tied = keys == last
        rank = tl.cumsum(tied.to(tl.int64), 0)
        weights = weight_of(values, best, temperature)
        weights = tl.where(weights < min_p, 0.0, weights)
        weights = tl.where((keys > last) | (tied & (rank <= left)), weights, 0.0)
        passed = start + tl.cumsum(weights, 0)
        last_token = tl.max(tl.where(weights > 0.0, token_ids, 0), 0)
        token = tl.min(tl.where((passed > point) & (weights > 0.0), token_ids, last_token), 0)
    tl.store(drawn + row, tl.where(bad, -1, token).to(tl.int64))


def draw_tokens(
    logits: torch.Tensor, settings: torch.Tensor, *, any_top_k: bool, any_top_p: bool, chunk: int = CHUNK
) -> torch.Tensor:
    """One token id per setting (`draw_settings`, on the device), or BROKEN. `logits` are fp32 with neighbouring values.
    `any_top_k` and `any_top_p` say whether any of the settings filters by them; launches for what nobody asks for are left
    out."""
    count, vocab, device = len(settings), logits.shape[1], logits.device
    chunks = triton.cdiv(vocab, chunk)
    padded = triton.next_power_of_2(chunks)

    def per_chunk(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, chunks, dtype=dtype, device=device)

    peaks, places, broken = per_chunk(torch.float32), per_chunk(torch.int32), per_chunk(torch.int32)
    grid = (count, chunks)
    survey_kernel[grid](logits, settings, peaks, places, broken, logits.stride(0), vocab, CHUNK=chunk, num_warps=_WARPS)
    by_count, by_weight = _Search(count, chunks, device), _Search(count, chunks, device)
    for search, wanted, weigh in ((by_count, any_top_k, False), (by_weight, any_top_p, True)):
        for digit in range(_DIGITS if wanted else 0):
            narrow_kernel[grid](
                logits,
                settings,
                peaks,
                *by_count.result,
                search.sums[(digit + 1) % 2],
                search.sums[digit % 2],
                *search.known,
                logits.stride(0),
                vocab,
                PASS=digit,
                BY_WEIGHT=weigh,
                ANY_TOP_K=any_top_k,
                CHUNK=chunk,
                CHUNKS=padded,
                num_warps=_WARPS,
            )
    last_keys = torch.empty(count, dtype=torch.int64, device=device)
    last_counts = torch.empty(count, dtype=torch.int64, device=device)
    masses, ties = per_chunk(torch.float64), per_chunk(torch.int64)
    weigh_kernel[grid](
        logits,
        settings,
        peaks,
        *by_count.result,
        *by_weight.result,
        last_keys,
        last_counts,
        masses,
        ties,
        logits.stride(0),
        vocab,
        ANY_TOP_K=any_top_k,
        ANY_TOP_P=any_top_p,
        CHUNK=chunk,
        CHUNKS=padded,
        num_warps=_WARPS,
    )
    drawn = torch.empty(count, dtype=torch.int64, device=device)
    pick_kernel[(count,)](
        logits,
        settings,
        peaks,
        places,
        broken,
        last_keys,
        last_counts,
        masses,
        ties,
        drawn,
        chunks,
        logits.stride(0),
        vocab,
        CHUNK=chunk,
        CHUNKS=padded,
        num_warps=_WARPS,
    )
    return drawn


class _Search:
    """What the passes of a search leave for the next: sums of chunks, and what was known before each pass."""

    def __init__(self, rows: int, chunks: int, device: torch.device) -> None:
        self.sums = [torch.empty(rows, chunks, 16, dtype=torch.float64, device=device) for _ in range(2)]
        self.known = (
            torch.empty(_DIGITS, rows, dtype=torch.int64, device=device),
            torch.empty(_DIGITS, rows, dtype=torch.float64, device=device),
            torch.empty(_DIGITS, rows, dtype=torch.float64, device=device),
        )

    @property
    def result(self) -> tuple[torch.Tensor, ...]:
        return self.sums[(_DIGITS - 1) % 2], *self.known


def draw_tokens_reference(
    logits: torch.Tensor, settings: torch.Tensor, *, any_top_k: bool, any_top_p: bool, chunk: int = CHUNK
) -> torch.Tensor:
    drawn = []
    reals = settings.view(torch.float64)
    for (row, seed, choice, position, top_k, *_), (*_, temperature, top_p, min_p) in zip(
        settings.tolist(), reals.tolist(), strict=True
    ):
        values = logits[row].cpu().numpy()
        if np.isnan(values).any() or not math.isfinite(values.max()):
            drawn.append(BROKEN)
        elif temperature == 0.0:
            drawn.append(int(values.argmax()))
        else:
            spec = SampleSpec(position, seed, choice, temperature, top_k, top_p, min_p, None)
            token_ids, weights = candidates(values, spec)
            cumulated = np.cumsum(weights)
            place = int(np.searchsorted(cumulated, uniform(seed, choice, position) * cumulated[-1], side="right"))
            place = min(place, len(weights) - 1)
            drawn.append(place if token_ids is None else int(token_ids[place]))
    return torch.tensor(drawn, device=logits.device)
