"""The rules of a request applied to rows of logits on the device: `logit_rules` in at most four launches and three copies.

    bias -> penalties -> what must not come       entries of `logit_edits`, all rows together, one copy
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

from common.engine import logit_edits, logit_rules
from common.engine.to_device import to_device
from common.engine.token_rules import Ids, RowRules

_ENTRIES = 256
_TOKENS = 4096


@triton.jit
def entries_of(edits, KIND: tl.constexpr, ENTRIES: tl.constexpr):
    """Of the program: its entries, which of them there are, their places in the logits, and how many there are in all."""
    begin, count = edits + tl.load(edits + KIND), tl.load(edits + KIND + 1)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < count
    return begin + entry, there, tl.load(begin + entry, mask=there, other=0).to(tl.int64), count


@triton.jit
def value_of(at, there, count, COLUMN: tl.constexpr):
    return tl.load(at + COLUMN * count, mask=there, other=0).to(tl.float32, bitcast=True)


@triton.jit
def bias_kernel(logits, edits, KIND: tl.constexpr, ENTRIES: tl.constexpr):
    entry, there, place, count = entries_of(edits, KIND, ENTRIES)
    value = value_of(entry, there, count, 1)
    tl.store(logits + place, tl.load(logits + place, mask=there, other=0.0) + value, mask=there)


@triton.jit
def penalty_kernel(logits, edits, KIND: tl.constexpr, ENTRIES: tl.constexpr):
    entry, there, place, count = entries_of(edits, KIND, ENTRIES)
    logit = tl.load(logits + place, mask=there, other=0.0)
    repetition = tl.where(there, value_of(entry, there, count, 1), 1.0)
    frequency = value_of(entry, there, count, 2)
    presence = value_of(entry, there, count, 3)
    generated = value_of(entry, there, count, 4)
    logit = tl.where(logit > 0, logit / repetition, logit * repetition)
    logit = logit - frequency * generated
    tl.store(logits + place, logit - tl.where(generated > 0, presence, 0.0), mask=there)


@triton.jit
def ban_kernel(logits, edits, KIND: tl.constexpr, ENTRIES: tl.constexpr):
    _, there, place, _ = entries_of(edits, KIND, ENTRIES)
    tl.store(logits + place, float("-inf"), mask=there)


@triton.jit
def mask_kernel(logits, rows, words, stride, vocab, num_words, TOKENS: tl.constexpr):
    """`words` [masks, num_words]: bit i of word w is token 32 * w + i, and 1 if it may come."""
    mask = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = token < vocab
    word = tl.load(words + mask * num_words + token // 32, mask=inside, other=0)
    away = ((word >> (token % 32)) & 1) == 0
    tl.store(logits + tl.load(rows + mask) * stride + token, float("-inf"), mask=inside & away)


def apply_edits(logits: torch.Tensor, edits: torch.Tensor, most: tuple[int, int, int]) -> None:
    """Changes single logits in place, as `logit_edits` on the device say: at most so many biases, penalties and bans. How many
    there are is read on the device, so a captured launch serves every step."""
    for kernel, kind, entries in (
        (bias_kernel, logit_edits.BIASES, most[0]),
        (penalty_kernel, logit_edits.PENALTIES, most[1]),
        (ban_kernel, logit_edits.BANS, most[2]),
    ):
        if entries:
            kernel[(triton.cdiv(entries, _ENTRIES),)](logits, edits, KIND=kind, ENTRIES=_ENTRIES)


def apply_rules(logits: torch.Tensor, rules: Sequence[RowRules]) -> None:
    """Changes `logits` (fp32, contiguous, [rows, vocab]) in place; `rules[i]` is for row i."""
    vocab, ruled = logits.shape[1], list(enumerate(rules))
    counts = logit_edits.edit_counts(ruled)
    if any(counts):
        words = np.empty(logit_edits.words_for(counts), dtype=np.int32)
        logit_edits.write_edits(words, ruled, vocab)
        apply_edits(logits, _on(logits, words), counts)
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


def _on(logits: torch.Tensor, values: npt.NDArray[np.generic]) -> torch.Tensor:
    return to_device(values, logits.device)
