"""The rules of a request applied to rows of logits on the device: `logit_rules` in at most four launches and as many copies.

    bias -> penalties -> what must not come       each an entry (row, token id, numbers), all rows together
    -> what is not in a packed mask               one bit per token: grammars' masks, and lists of allowed tokens

Within a launch no two entries are about one logit, so their order does not matter; the arithmetic is that of `logit_rules`, in
fp32 and entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from common.engine import logit_rules
from common.engine.token_rules import Ids, RowRules

_ENTRIES = 256
_TOKENS = 4096


@triton.jit(do_not_specialize=["count"])
def bias_kernel(logits, places, values, count, ENTRIES: tl.constexpr):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < count
    at = logits + tl.load(places + entry, mask=there, other=0)
    tl.store(at, tl.load(at, mask=there, other=0.0) + tl.load(values + entry, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=["count"])
def penalty_kernel(logits, places, values, count, ENTRIES: tl.constexpr):
    """`values` [4, count]: repetition, frequency, presence, how often the token was generated."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < count
    at = logits + tl.load(places + entry, mask=there, other=0)
    logit = tl.load(at, mask=there, other=0.0)
    repetition = tl.load(values + entry, mask=there, other=1.0)
    frequency = tl.load(values + count + entry, mask=there, other=0.0)
    presence = tl.load(values + 2 * count + entry, mask=there, other=0.0)
    generated = tl.load(values + 3 * count + entry, mask=there, other=0.0)
    logit = tl.where(logit > 0, logit / repetition, logit * repetition)
    logit = logit - frequency * generated
    tl.store(at, logit - tl.where(generated > 0, presence, 0.0), mask=there)


@triton.jit(do_not_specialize=["count"])
def ban_kernel(logits, places, count, ENTRIES: tl.constexpr):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < count
    tl.store(logits + tl.load(places + entry, mask=there, other=0), float("-inf"), mask=there)


@triton.jit
def mask_kernel(logits, rows, words, stride, vocab, num_words, TOKENS: tl.constexpr):
    """`words` [masks, num_words]: bit i of word w is token 32 * w + i, and 1 if it may come."""
    mask = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = token < vocab
    word = tl.load(words + mask * num_words + token // 32, mask=inside, other=0)
    away = ((word >> (token % 32)) & 1) == 0
    tl.store(logits + tl.load(rows + mask) * stride + token, float("-inf"), mask=inside & away)


def apply_rules(logits: torch.Tensor, rules: Sequence[RowRules]) -> None:
    """Changes `logits` (fp32, contiguous, [rows, vocab]) in place; `rules[i]` is for row i."""
    vocab = logits.shape[1]
    biases = [(row, item.bias) for row, item in enumerate(rules) if item.bias is not None]
    if biases:
        places = _places(vocab, [(row, bias.token_ids) for row, bias in biases])
        values = np.concatenate([bias.values for _, bias in biases])
        bias_kernel[_grid(places)](logits, _on(logits, places), _on(logits, values), len(places), ENTRIES=_ENTRIES)
    penalties = [(row, item.penalties) for row, item in enumerate(rules) if item.penalties is not None]
    if penalties:
        places = _places(vocab, [(row, item.token_ids) for row, item in penalties])
        lengths = [len(item.token_ids) for _, item in penalties]
        per_row = np.array([(item.repetition, item.frequency, item.presence) for _, item in penalties], dtype=np.float32)
        counts = np.concatenate([item.counts for _, item in penalties])
        values = np.concatenate((np.repeat(per_row.T, lengths, axis=1), counts[None]))
        penalty_kernel[_grid(places)](logits, _on(logits, places), _on(logits, values), len(places), ENTRIES=_ENTRIES)
    # A tokenizer may know an end token that the model has no logit for: it cannot be drawn anyway.
    banned = [(row, item.banned_token_ids[item.banned_token_ids < vocab]) for row, item in enumerate(rules)]
    if any(len(token_ids) for _, token_ids in banned):
        places = _places(vocab, banned)
        ban_kernel[_grid(places)](logits, _on(logits, places), len(places), ENTRIES=_ENTRIES)
    num_words = -(-vocab // 32)
    masks = [
        (row, _packed(item.allowed_token_ids, num_words)) for row, item in enumerate(rules) if item.allowed_token_ids is not None
    ]
    masks += [(row, item.mask.words[:num_words]) for row, item in enumerate(rules) if item.mask is not None]
    if masks:
        mask_kernel[(len(masks), triton.cdiv(vocab, _TOKENS))](
            logits,
            _on(logits, np.array([row for row, _ in masks])),
            _on(logits, np.stack([words for _, words in masks]).view(np.int32)),
            logits.stride(0),
            vocab,
            num_words,
            TOKENS=_TOKENS,
        )


apply_rules_reference = logit_rules.apply_rules


def _packed(token_ids: Ids, num_words: int) -> npt.NDArray[np.uint32]:
    bits = np.zeros(num_words * 32, dtype=np.uint8)
    bits[token_ids] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _places(vocab: int, entries: Sequence[tuple[int, Ids]]) -> Ids:
    return np.concatenate([row * vocab + token_ids for row, token_ids in entries])


def _grid(places: Ids) -> tuple[int]:
    return (triton.cdiv(len(places), _ENTRIES),)


def _on(logits: torch.Tensor, values: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values).to(logits.device, non_blocking=True)
