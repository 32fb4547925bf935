"""What rules change about single logits, as one block of int32 that a device reads: one copy, whatever is in it.

    | where biases begin, how many | penalties | bans | -- |   places | values |   places | repetition | ... |   places |
      8 words                                                  biases              penalties                     bans

A place is row * vocabulary + token id; values are fp32, bit for bit. Of each kind every logit has one entry at most. What is not
here, since it says of all tokens of a row whether they may come: lists of allowed tokens and masks of grammars.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.engine.token_rules import Bias, Ids, Penalties, RowRules

HEADER_WORDS = 8
BIAS_WORDS, PENALTY_WORDS, BAN_WORDS = 2, 5, 1  # of an entry: its place, and its values
BIASES, PENALTIES, BANS = 0, 2, 4  # where the header speaks of them

Words = npt.NDArray[np.int32]
RuledRow = tuple[int, RowRules]


def edit_counts(ruled: Sequence[RuledRow]) -> tuple[int, int, int]:
    """How many biases, penalties and bans there are at most."""
    biases = sum(len(rules.bias.token_ids) for _, rules in ruled if rules.bias is not None)
    penalties = sum(len(rules.penalties.token_ids) for _, rules in ruled if rules.penalties is not None)
    return biases, penalties, sum(len(rules.banned_token_ids) for _, rules in ruled)


def words_for(counts: tuple[int, int, int]) -> int:
    biases, penalties, bans = counts
    return HEADER_WORDS + biases * BIAS_WORDS + penalties * PENALTY_WORDS + bans * BAN_WORDS


def write_edits(words: Words, ruled: Sequence[RuledRow], vocab: int) -> int:
    """Writes the edits of some rows, of which there is one entry each; returns how many words that took. `words` has room for
    `words_for(edit_counts(ruled))`."""
    biases = [(row, rules.bias) for row, rules in ruled if rules.bias is not None]
    penalties = [(row, rules.penalties) for row, rules in ruled if rules.penalties is not None]
    # A tokenizer may know an end token that the model has no logit for: it cannot be drawn anyway.
    bans = [(row, rules.banned_token_ids[rules.banned_token_ids < vocab]) for row, rules in ruled]
    words[:HEADER_WORDS] = 0
    at = HEADER_WORDS
    for kind, columns in ((BIASES, _bias_columns(biases, vocab)), (PENALTIES, _penalty_columns(penalties, vocab))):
        words[kind : kind + 2] = at, len(columns[0])
        for column in columns:
            words[at : at + len(column)] = column.view(np.int32)
            at += len(column)
    places = _places(bans, vocab)
    words[BANS : BANS + 2] = at, len(places)
    words[at : at + len(places)] = places
    return at + len(places)


def _bias_columns(biases: Sequence[tuple[int, Bias]], vocab: int) -> list[npt.NDArray[np.int32] | npt.NDArray[np.float32]]:
    places = _places([(row, bias.token_ids) for row, bias in biases], vocab)
    return [places, _joined([bias.values for _, bias in biases])]


def _penalty_columns(
    penalties: Sequence[tuple[int, Penalties]], vocab: int
) -> list[npt.NDArray[np.int32] | npt.NDArray[np.float32]]:
    """Repetition, frequency, presence, and how often the token was generated."""
    lengths = [len(item.token_ids) for _, item in penalties]
    per_row = np.array([(item.repetition, item.frequency, item.presence) for _, item in penalties], dtype=np.float32)
    repeated = np.repeat(per_row.reshape(-1, 3), lengths, axis=0).T
    places = _places([(row, item.token_ids) for row, item in penalties], vocab)
    return [places, *(np.ascontiguousarray(column) for column in repeated), _joined([item.counts for _, item in penalties])]


def _places(entries: Sequence[tuple[int, Ids]], vocab: int) -> npt.NDArray[np.int32]:
    parts = [(row * vocab + token_ids).astype(np.int32) for row, token_ids in entries]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def _joined(values: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    return np.concatenate(values) if values else np.empty(0, dtype=np.float32)
