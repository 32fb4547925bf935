"""Whether the next step can be prepared while one is still being computed: a pure look at who takes part in that one.

A step ahead takes the tokens that it does not know as placeholders (`common.engine.in_flight_step`). That works as long as it is
known *that* a token comes and where it goes, not which one. If the token turns out to end its answer (a stop token; limits are
known beforehand), the row computed behind it is thrown away: nobody sees a token of it, its time counts as wasted, and its blocks
are given to nobody until that step has ended (`Choice.retired`).

What has to be known for some row is a reason to `Wait` for the whole step: it is then prepared as without overlap, once the
tokens are there. Rows are not left out of a step to spare the others the wait, for that would cost them a whole step.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable

from decode_worker.generation import Choice


class Wait(enum.Enum):
    """Why the next step is prepared only when the one under way was read."""

    GUESSES = "guesses"  # how many of its guesses were right decides where the next token goes; or it is time to ask who guesses
    RULES = "rules"  # a grammar, a penalty or a ban of several tokens: what may come next depends on the token
    FORK = "fork"  # choices went on from one prompt: blocks are to be copied, while no step writes to any
    ROOM = "room"  # somebody has to lose its blocks, and those of a step under way cannot be taken
    NOTHING = "nothing"  # there is nothing to compute, as far as is known


def overlaps(overlap: str, device: str, *, threads: int, stages: int = 1) -> bool:
    """Of `common.config.DecodeConfig.overlap`. A GPU computes by itself, and a pipeline is kept full by nothing else. On a CPU a
    plan is made by a core that would compute otherwise, unless there are more cores than threads that compute."""
    if overlap == "auto":
        return device != "cpu" or stages > 1 or len(os.sched_getaffinity(0)) > threads
    return overlap == "on"


_SILENT_STEPS = 16  # in which nobody guessed anything
_STEPS_BETWEEN = 7


class Asking:
    """When whoever guesses has to see the tokens: always, as long as guesses are made; if for a while there were none, from time
    to time, so that steps in between can be planned ahead."""

    def __init__(self) -> None:
        self._silent_steps = 0
        self._skipped_steps = 0

    @property
    def is_due(self) -> bool:
        return self._silent_steps < _SILENT_STEPS or self._skipped_steps >= _STEPS_BETWEEN

    def asked(self, *, guessed: bool) -> None:
        self._silent_steps = 0 if guessed else self._silent_steps + 1
        self._skipped_steps = 0

    def skipped(self) -> None:
        self._skipped_steps += 1


def reason_to_wait(running: Iterable[Choice]) -> Wait | None:
    """Of those that take part in the step under way; room is another matter."""
    for choice in running:
        share = choice.share
        if share is None:
            continue
        if share.num_drafts:
            return Wait.GUESSES
        if share.draws and choice.needs_tokens and not choice.ends_ahead:
            return Wait.RULES
    return None
