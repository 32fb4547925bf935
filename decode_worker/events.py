"""What the scheduler tells the streams, and what a hand-off tells the scheduler. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import PdserveError
from common.types import Request, SampledToken, StageTimings, Started, TokenChunk, TokenLogprob, WorkAccount, WorkerRef

if TYPE_CHECKING:
    from common.engine.heads.rows import HiddenRow


@dataclass(frozen=True, slots=True)
class Output:
    """News of a request for its stream. `done` = every choice has finished; nothing follows, and the account is there."""

    request_id: str
    started: Started | None
    chunks: tuple[TokenChunk, ...]
    done: bool
    account: WorkAccount | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends in this error; nothing follows."""

    request_id: str
    error: PdserveError


@dataclass(frozen=True, slots=True)
class RemotePrefillWanted:
    """Blocks are reserved; somebody is to have them written. Answered by remote_ready, or by remote_failed and drained."""

    request: Request
    prefill: WorkerRef
    attempt: int
    first_block: int
    blocks: tuple[int, ...]
    wants_row: bool = False  # and the hidden row that the first tokens are drawn from


Event = Output | Failed | RemotePrefillWanted


@dataclass(frozen=True, slots=True)
class RemotePrefill:
    """A verified hand-off. Written by the hand-off; `timings` holds every stage but `decode_queue_s` and `activate_s`."""

    first_tokens: tuple[SampledToken, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    cached_tokens: int
    timings: StageTimings
    work_s: float = 0.0  # the prompt's share of steps elsewhere,
    work_tokens: int = 0  # and how many tokens of it were computed there
    row: HiddenRow | None = None  # what the first tokens were drawn from, if it was asked for
