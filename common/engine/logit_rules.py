"""Applies the rules of `token_rules` to rows of logits.

    bias -> repetition penalty -> frequency and presence penalty -> everything but the allowed ids away -> banned ids away
                                                                  -> or all that a grammar's mask does not have

    bias         logit + value
    repetition   logit / penalty if logit > 0, else logit * penalty      for tokens of the prompt and of the answer
    frequency    logit - penalty * count                                 for tokens of the answer
    presence     logit - penalty                                         for tokens of the answer

A rule touches the few entries that it names, of all rows at once: one gather, some arithmetic and one scatter over flat indices,
in fp32 and entry by entry, so that a row comes out the same whoever else is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from common.engine.grammar import NextMask, ceilings
from common.engine.token_rules import Bias, Ids, Penalties, RowRules


def apply_rules(logits: torch.Tensor, rules: Sequence[RowRules]) -> None:
    """Changes `logits` (fp32, contiguous, [rows, vocab]) in place; `rules[i]` is for row i."""
    _add_bias(logits, [(row, item.bias) for row, item in enumerate(rules) if item.bias is not None])
    _penalise(logits, [(row, item.penalties) for row, item in enumerate(rules) if item.penalties is not None])
    _keep_allowed(logits, [(row, item.allowed_token_ids) for row, item in enumerate(rules) if item.allowed_token_ids is not None])
    _ban(logits, [(row, item.banned_token_ids) for row, item in enumerate(rules) if len(item.banned_token_ids)])
    _mask(logits, [(row, item.mask) for row, item in enumerate(rules) if item.mask is not None])


def _add_bias(logits: torch.Tensor, biases: Sequence[tuple[int, Bias]]) -> None:
    if not biases:
        return
    index = _on(logits, _flat(logits, [(row, bias.token_ids) for row, bias in biases]))
    values = _on(logits, np.concatenate([bias.values for _, bias in biases]))
    entries = logits.view(-1)
    entries[index] = entries[index] + values


def _penalise(logits: torch.Tensor, penalties: Sequence[tuple[int, Penalties]]) -> None:
    if not penalties:
        return
    entries = logits.view(-1)
    index = _on(logits, _flat(logits, [(row, item.token_ids) for row, item in penalties]))
    lengths = [len(item.token_ids) for _, item in penalties]
    per_row = np.array([(item.repetition, item.frequency, item.presence) for _, item in penalties], dtype=np.float32)
    counts = np.concatenate([item.counts for _, item in penalties])
    packed = np.concatenate((np.repeat(per_row.T, lengths, axis=1), counts[None]))
    repetition, frequency, presence, count = _on(logits, packed)
    found = entries[index]
    found = torch.where(found > 0, found / repetition, found * repetition)
    found = found - frequency * count
    entries[index] = found - presence * (count > 0)


def _keep_allowed(logits: torch.Tensor, allowed: Sequence[tuple[int, Ids]]) -> None:
    if not allowed:
        return
    entries = logits.view(-1)
    index = _on(logits, _flat(logits, allowed))
    kept = entries[index]
    for row, _ in allowed:
        logits[row].fill_(-torch.inf)
    entries[index] = kept


def _ban(logits: torch.Tensor, banned: Sequence[tuple[int, Ids]]) -> None:
    # A tokenizer may know an end token that the model has no logit for: it cannot be drawn anyway.
    known = [(row, token_ids[token_ids < logits.shape[1]]) for row, token_ids in banned]
    if known:
        logits.view(-1)[_on(logits, _flat(logits, known))] = -torch.inf


def _mask(logits: torch.Tensor, masks: Sequence[tuple[int, NextMask]]) -> None:
    if not masks:
        return
    if logits.device.type == "cpu":  # numpy is several times as fast here
        on_host = logits.numpy()
        for row, mask in masks:
            np.minimum(on_host[row], ceilings(mask.words, logits.shape[1]), out=on_host[row])
        return
    rows = _on(logits, np.array([row for row, _ in masks]))
    limits = _on(logits, np.stack([ceilings(mask.words, logits.shape[1]) for _, mask in masks]))
    logits[rows] = torch.minimum(logits[rows], limits)


def _flat(logits: torch.Tensor, entries: Sequence[tuple[int, Ids]]) -> Ids:
    return np.concatenate([row * logits.shape[1] + token_ids for row, token_ids in entries])


def _on(logits: torch.Tensor, values: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values).to(logits.device)
