"""Where a prompt is prefilled: a pure decision over what is known when its blocks have been reserved.

The router chooses when it can forecast both ways (`PrefillChoice`): it knows how busy the prefill workers are, which this worker
does not. Without a forecast a threshold stands in: with few uncached tokens the way there and back costs more than computing them
beside the running decodes. With nobody to ask, the worker serves alone: an empty prefill pool degrades to aggregated serving, not
to errors. What the configuration rules out, no router can ask for.
"""

from __future__ import annotations

import enum
from typing import Protocol

from common.types import PrefillChoice


class LocalPrefill(Protocol):
    """Of `common.config.DecodeConfig`, what is said of prompts that are prefilled here."""

    @property
    def local_prefill(self) -> str: ...

    @property
    def local_prefill_tokens(self) -> int: ...


class PrefillPlace(enum.Enum):
    LOCAL = "local"
    REMOTE = "remote"
    NOWHERE = "nowhere"  # configured never to prefill here, and nobody else can


def choose_place(config: LocalPrefill, choice: PrefillChoice, *, uncached_tokens: int, num_candidates: int) -> PrefillPlace:
    if config.local_prefill == "always":
        return PrefillPlace.LOCAL
    if num_candidates == 0:
        return PrefillPlace.LOCAL if config.local_prefill == "auto" else PrefillPlace.NOWHERE
    if config.local_prefill == "never" or choice is PrefillChoice.THERE:
        return PrefillPlace.REMOTE
    here = choice is PrefillChoice.HERE or uncached_tokens <= config.local_prefill_tokens
    return PrefillPlace.LOCAL if here else PrefillPlace.REMOTE
