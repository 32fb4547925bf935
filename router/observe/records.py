"""What an `Observatory` remembers: plain values, with no word of a prompt, an answer or a key in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from router.cache.report import CacheResult
from router.observe.cost import NOTHING, CostSplit

_HITS = frozenset({CacheResult.HIT_EXACT, CacheResult.HIT_SEMANTIC, CacheResult.COALESCED})


class Stage(NamedTuple):
    """A piece of a request's way to its first token; the pieces follow each other."""

    name: str  # as in common.lifecycle.Waterfall.stages
    seconds: float


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One call of a client that has ended, however it ended. Written by the observatory."""

    request_id: str  # as the client sees it; not unique, since clients may choose it
    endpoint: str  # "/v1/chat/completions", "/v1/completions", "grpc/Generate"
    tenant: str  # of a bounded set; "" = it never came to that
    band: str
    started_at_s: float  # wall clock
    status: int  # HTTP; over gRPC what HTTP would have said; 499 = the client left
    error: str  # name of the error class; "" = it ended well, or the client left
    total_s: float
    slo: str  # the class of its promise; "" = none
    slo_met: bool | None = None  # None = it counts for neither: the client was at fault, or left in time
    model: str = ""  # that answered; "" if it never came to that
    cache: str = ""  # what x-cache said; "" = nothing was answered
    num_choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt
    queue_s: float = 0.0  # in the router
    ttft_s: float | None = None  # None = there was no first token
    tpot_s: float | None = None  # None = fewer than two tokens
    stages: tuple[Stage, ...] = ()  # of the first prompt of the call; they add up to ttft_s
    transfer_hidden_s: float = 0.0  # KV that travelled while the prompt was still being computed
    transport: str = ""  # "" = no KV travelled
    transfer_bytes: int = 0
    prefill_worker: str = ""  # "" = computed by the decode worker, or by nobody
    decode_worker: str = ""  # the first one; "" = nobody
    unexplained_s: float = 0.0  # of the time to the first token, by no clock: network, event loops
    retries: int = 0  # before the first token
    migrated_to: tuple[str, ...] = ()  # decode workers that went on with it after others were lost
    cost: CostSplit = NOTHING
    trace_id: str = ""  # hex; "" = it was not traced

    @property
    def ended_well(self) -> bool:
        return self.status == 200

    @property
    def from_cache(self) -> bool:
        """No worker computed it."""
        return self.cache in _HITS


@dataclass(frozen=True, slots=True)
class ActiveRequest:
    """One call that is in progress. Made when it is asked for."""

    request_id: str
    endpoint: str
    model: str
    tenant: str
    band: str
    started_at_s: float
    age_s: float
    ttft_s: float | None
    prompt_tokens: int
    completion_tokens: int
    decode_worker: str


@dataclass(frozen=True, slots=True)
class SloCount:
    """Requests that kept a promise, and that did not."""

    met: int = 0
    missed: int = 0

    @property
    def ratio(self) -> float | None:
        total = self.met + self.missed
        return self.met / total if total else None


@dataclass(frozen=True, slots=True)
class Second:
    """One second of the router. Requests count in the second in which they ended, tokens in which they came."""

    at_s: float  # wall clock, where it began
    length_s: float  # 1, unless the router was held up
    requests: int
    failed: int  # of them, with a status of 429 or from 500
    in_flight: int  # at its end
    queued: int  # of them, waiting for a worker
    tokens: int  # generated
    prompt_tokens: int  # of the requests that ended
    cached_tokens: int  # of those, found in prefix caches
    cache_hits: int  # answers that no worker computed
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    slo: Mapping[str, SloCount]  # by class, those that were promised something
    cost: CostSplit
    loop_delay_s: float  # how late the router's event loop was
