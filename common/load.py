"""What a worker says of itself to routers, its load and what its prefix cache holds, and to the pool manager, its pace. Values
only.

Every figure was read between two steps of the engine, so that the parts of one report agree with each other. Written by
`common.engine.reporter`, read by `router.placement`; `common.codec` carries them.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.blocks import BlockKey


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step of the engine, as a predictor of steps wants it."""

    tokens: int
    pairs: float  # (token, token it attends to) pairs
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    running: int = 0  # requests that hold blocks
    waiting: int = 0  # requests that hold none
    queued_tokens: int = 0  # prompt tokens still to be computed here; cached ones are left out as far as they are known
    queued_pairs: float = 0.0
    decoding: int = 0  # sequences that get one token per step
    kv_tokens: int = 0  # tokens that those attend to
    blocks_free: int = 0  # free or cached

    @property
    def requests(self) -> int:
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class WorkerPace:
    """How busy a worker is and how fast. The totals only grow while an incarnation lives: two readings make a rate."""

    queue_age_s: float = 0.0  # how long the oldest request waits that nothing was computed of
    queued_tokens: int = 0
    decoding: int = 0
    computed_tokens: int = 0  # total
    generated_tokens: int = 0  # total
    step_s: float = 0.0  # total: seconds in steps
    sequence_step_s: float = 0.0  # total: seconds in steps, times the sequences that got tokens in them


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """What does not change while an incarnation lives."""

    block_tokens: int
    layout_fingerprint: bytes
    blocks_total: int
    step_tokens: int  # most tokens of one step
    local_prefill: str = "auto"
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """`shape` is there in a whole picture, which replaces all that was known; without it, `registered` and `evicted` are changes
    since the report before. No key is in both."""

    sequence: int
    load: WorkerLoad
    shape: WorkerShape | None = None
    dispatches: tuple[int, ...] = ()  # Request.dispatch_id that this report counts and the one before did not
    registered: tuple[BlockKey, ...] = ()
    evicted: tuple[BlockKey, ...] = ()
    steps: tuple[StepSample, ...] = ()


def pairs(num_new: int, num_total: int) -> float:
    """How many (token, earlier token) pairs attention looks at for the last `num_new` of `num_total` tokens."""
    return num_new * (num_total - num_new / 2)
