"""Where a prompt is prefilled: a pure decision over what is known when its blocks have been reserved.

Remote prefill pays when there is enough to compute; with few uncached tokens the way there and back costs more than computing
them beside the running decodes. With nobody to ask, the worker serves alone: an empty prefill pool degrades to aggregated
serving, not to errors.
"""

from __future__ import annotations

import enum

from common.config import DecodeConfig


class PrefillPlace(enum.Enum):
    LOCAL = "local"
    REMOTE = "remote"
    NOWHERE = "nowhere"  # configured never to prefill here, and nobody else can


def choose_place(config: DecodeConfig, *, uncached_tokens: int, num_candidates: int) -> PrefillPlace:
    if config.local_prefill == "always":
        return PrefillPlace.LOCAL
    if num_candidates == 0:
        return PrefillPlace.LOCAL if config.local_prefill == "auto" else PrefillPlace.NOWHERE
    if config.local_prefill == "auto" and uncached_tokens <= config.local_prefill_tokens:
        return PrefillPlace.LOCAL
    return PrefillPlace.REMOTE
