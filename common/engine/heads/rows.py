"""The hidden row that a token was drawn from: all that heads need of a sequence, besides the token.

It is the sum behind the last layer, before the last norm, of one place in a sequence. It lives where the engine computes; on its
way to another worker it is bf16, which loses no range. Wrong or lost, it costs a guess and changes no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.engine.batch import SequenceSlice
from common.engine.verification import num_sampled_rows
from common.types import SampledToken

_BYTES_PER_VALUE = 2


@dataclass(frozen=True, slots=True)
class HiddenRow:
    values: torch.Tensor  # [hidden], perhaps with padding behind; nobody writes to it

    def to_bytes(self) -> bytes:
        """bf16, little-endian."""
        return self.values.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> HiddenRow:
        """Of any length: whoever reads the values knows how many there have to be."""
        whole = data[: len(data) // _BYTES_PER_VALUE * _BYTES_PER_VALUE]
        if not whole:
            return cls(torch.empty(0, dtype=torch.bfloat16))
        return cls(torch.frombuffer(bytearray(whole), dtype=torch.uint8).view(torch.bfloat16))


def hidden_rows(
    rows: torch.Tensor, slices: Sequence[SequenceSlice], drawn: Sequence[Sequence[SampledToken]]
) -> list[HiddenRow | None]:
    """Of each slice what the last of its tokens was drawn from. `rows` are its `num_sampled_rows` rows, slice by slice."""
    found: list[HiddenRow | None] = []
    first = 0
    for item, tokens in zip(slices, drawn, strict=True):
        last = len(tokens) - 1 if item.num_drafts else 0
        found.append(HiddenRow(rows[first + last]) if tokens else None)
        first += num_sampled_rows(item)
    return found
