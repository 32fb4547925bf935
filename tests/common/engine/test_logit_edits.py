"""Edits as one block of numbers, carried out one by one, against the rules that they were made of."""

from __future__ import annotations

import numpy as np
import torch

from common.engine.logit_edits import HEADER_WORDS, edit_counts, words_for, write_edits
from common.engine.logit_rules import apply_rules
from common.engine.token_rules import Bias, Penalties, RowRules
from support.host_draws import HostDraws

VOCAB = 60


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, dtype=np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


RULES = [
    RowRules(
        Bias(ids(4, 59), floats(2.5, -1.0)),
        Penalties(ids(4, 7, 9), floats(2, 0, 1), 1.3, 0.5, -0.25),
        banned_token_ids=ids(3, VOCAB, VOCAB + 9),
    ),
    RowRules(),
    RowRules(penalties=Penalties(ids(8), floats(3), 0.9, 0.0, 1.0)),
    RowRules(Bias(ids(0), floats(100.0)), banned_token_ids=ids(0)),
]


def test_edits_are_what_the_rules_say() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = logits.clone()
    apply_rules(expected, RULES)
    ruled = list(enumerate(RULES))
    room = words_for(edit_counts(ruled))
    words = np.full(room + 5, 7, dtype=np.int32)
    used = write_edits(words, ruled, VOCAB)
    assert used == room - 2  # two bans were about tokens that have no logit
    assert words[used:].tolist() == [7] * 7
    HostDraws().edit(logits, torch.from_numpy(words))
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits.isinf(), expected.isinf())


def test_no_edits_are_a_header() -> None:
    words = np.full(20, 7, dtype=np.int32)
    assert write_edits(words, [(0, RowRules())], VOCAB) == HEADER_WORDS
    logits = torch.ones(1, VOCAB)
    HostDraws().edit(logits, torch.from_numpy(words))
    assert torch.equal(logits, torch.ones(1, VOCAB))
