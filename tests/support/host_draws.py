"""`RowDraws` by the sampler of the host, one number at a time: stands in for draws on a device, which are held against it."""

from __future__ import annotations

import struct

import torch

from common.engine.batch import SampleSpec
from common.engine.sampler import sample
from common.errors import EngineFailure


class HostDraws:
    def edit(self, logits: torch.Tensor, edits: torch.Tensor) -> None:
        words, flat = edits.tolist(), logits.view(-1)
        (biases, penalties, bans) = ((words[place], words[place + 1]) for place in (0, 2, 4))
        for entry in range(biases[1]):
            place, value = (words[biases[0] + column * biases[1] + entry] for column in range(2))
            flat[place] += _real(value)
        for entry in range(penalties[1]):
            place, *values = (words[penalties[0] + column * penalties[1] + entry] for column in range(5))
            repetition, frequency, presence, count = map(_real, values)
            logit = flat[place] / repetition if flat[place] > 0 else flat[place] * repetition
            flat[place] = logit - frequency * count - (presence if count > 0 else 0.0)
        for entry in range(bans[1]):
            flat[words[bans[0] + entry]] = -torch.inf

    def draw(self, logits: torch.Tensor, settings: torch.Tensor, *, any_top_k: bool, any_top_p: bool) -> torch.Tensor:
        drawn = []
        for numbers in settings.tolist():
            row, seed, choice, position, top_k = numbers[:5]
            temperature, top_p, min_p = struct.unpack("<3d", struct.pack("<3q", *numbers[5:]))
            if temperature:
                # What is not announced is not done.
                assert any_top_k or not 0 < top_k < logits.shape[1]
                assert any_top_p or top_p >= 1.0
            spec = SampleSpec(position, seed, choice, temperature, top_k, top_p, min_p, None)
            try:
                drawn.append(sample(logits, [spec], [row])[0].token_id)
            except EngineFailure:
                drawn.append(-1)
        return torch.tensor(drawn, device=logits.device)


def _real(word: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<i", word))[0]
    return value
