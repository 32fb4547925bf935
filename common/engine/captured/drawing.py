"""What has to be done to draw a step's tokens behind its logits, and whether the step can do it itself.

    every row greedy           the program has found the best tokens anyway
    any other draw             a program of its own behind that of the step, told by settings and edits of the packed inputs
    a reason of `OnHost`       the runner draws, from the step's logits, before another step is launched

The three programs that draw differ in what they leave out: nobody pays for searches that nobody's top-k or top-p asks for.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from common.engine.batch import SampleSpec, SequenceSlice
from common.engine.logit_edits import RuledRow


class OnHost(enum.Enum):
    """Why tokens are drawn behind a step instead of by it."""

    KERNELS = "torch has no draws that can be captured"
    LOGPROBS = "log-probabilities are reported, from logits that no rule has changed"
    GRAMMAR = "a grammar's mask may come after the step was launched"
    ALLOWED = "only listed tokens may come"
    EDITS = "more logits are to be changed than the packed inputs have room for"


class Filters(enum.Enum):
    """What the rows of a step ask for: (top-k, top-p)."""

    NONE = (False, False)
    TOP_P = (False, True)
    ALL = (True, True)


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """`filters` None: the best token of every row."""

    filters: Filters | None = None
    specs: Sequence[SampleSpec | None] = ()
    ruled: Sequence[RuledRow] = ()


GREEDY = DrawPlan()


def plan_draws(slices: Sequence[SequenceSlice], vocab: int) -> DrawPlan | OnHost:
    """For slices with at most one sample."""
    specs = [item.samples[0] if item.samples else None for item in slices]
    ruled: list[RuledRow] = []
    greedy, top_k, top_p = True, False, False
    for row, spec in enumerate(specs):
        if spec is None:
            continue
        if spec.logprobs is not None:
            return OnHost.LOGPROBS
        if spec.rules is not None:
            if spec.rules.mask is not None:
                return OnHost.GRAMMAR
            if spec.rules.allowed_token_ids is not None:
                return OnHost.ALLOWED
            ruled.append((row, spec.rules))
        if spec.temperature != 0.0:
            greedy = False
            top_k = top_k or 0 < spec.top_k < vocab
            top_p = top_p or spec.top_p < 1.0
    if greedy and not ruled:
        return GREEDY
    return DrawPlan(Filters.ALL if top_k else Filters.TOP_P if top_p else Filters.NONE, specs, ruled)
