"""One incarnation of a worker as this router sees it: what it reported, plus the own dispatches that no report counts yet.

    dispatch ──> unseen (counted here) ──report names it──> seen (the report counts it) ──> closed
                     ^                                        |
                     +----------- reports broke off ----------+

So neither a stale report nor a dispatch in flight makes a worker look idle, and none is counted twice. A report that is older
than the last one changes nothing. Beside counts it keeps `free_at_s`: when, as far as known, its prompts will be computed.

Owned by `fleet`; it has no clock and knows no other worker.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from common.load import WorkerLoad, WorkerReport, WorkerShape, pairs
from common.types import Role, WorkerRef
from router.placement.predictors import StepModel

_UNKNOWN_STEP_TOKENS = 512
_NOTHING = WorkerLoad()


@dataclass(frozen=True, slots=True)
class Charge:
    """What one dispatch puts on one worker."""

    requests: int = 1
    prompt_tokens: int = 0  # to be computed here
    prompt_pairs: float = 0.0
    sequences: int = 0  # that will decode here
    kv_tokens: int = 0  # that they will hold

    @classmethod
    def for_prefill(cls, new_tokens: int, total_tokens: int) -> Charge:
        return cls(prompt_tokens=new_tokens, prompt_pairs=pairs(new_tokens, total_tokens))


class Worker:
    __slots__ = (
        "_open",
        "decoding",
        "dispatches",
        "free_at_s",
        "key",
        "kv_tokens",
        "last_used",
        "load",
        "model",
        "ref",
        "reported_s",
        "reporting",
        "role",
        "room_tokens",
        "sequence",
        "shape",
        "slot",
        "step_s",
        "step_tokens",
        "steps",
        "unseen_kv_tokens",
        "unseen_pairs",
        "unseen_requests",
        "unseen_sequences",
        "unseen_tokens",
    )

    def __init__(self, ref: WorkerRef, role: Role, model: str, slot: int) -> None:
        self.ref = ref
        self.role = role
        self.model = model
        self.slot = slot
        self.steps = StepModel()
        self.shape: WorkerShape | None = None
        self.load: WorkerLoad = _NOTHING
        self.reporting = False
        self.sequence = 0  # of the last report
        self.reported_s = 0.0
        self.free_at_s = 0.0
        self.key: tuple[float, int, int] = (0.0, 0, slot)  # its place in the pool's order
        self.last_used = 0  # number of the last dispatch
        self.dispatches = 0
        self._open: dict[int, tuple[Charge, bool]] = {}  # dispatch id -> charge, whether a report counts it
        self.unseen_requests = 0
        self.unseen_tokens = 0
        self.unseen_pairs = 0.0
        self.unseen_sequences = 0
        self.unseen_kv_tokens = 0
        self.step_tokens = _UNKNOWN_STEP_TOKENS
        self.room_tokens: int | None = None  # KV that a new request could get now; None while it does not report
        self.decoding = self.kv_tokens = 0
        self.step_s = 0.0  # predicted: one step of what decodes here
        self.settle()

    # -- what it is loaded with ----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Works out, after changes, what decisions read often."""
        load = self.load
        self.decoding = load.decoding + self.unseen_sequences
        self.kv_tokens = load.kv_tokens + self.unseen_kv_tokens
        steps = self.steps
        self.step_s = steps.a + steps.b * self.decoding + steps.c * self.kv_tokens
        if self.shape is not None:
            self.step_tokens = max(1, self.shape.step_tokens)
            self.room_tokens = max(0, load.blocks_free * self.shape.block_tokens - self.unseen_kv_tokens)
        if not self.reporting:
            self.room_tokens = None

    @property
    def requests(self) -> int:
        return self.load.requests + self.unseen_requests

    @property
    def waiting(self) -> int:
        """Requests that compute nothing yet, as far as known."""
        return self.load.waiting + self.unseen_requests

    @property
    def queued_tokens(self) -> int:
        return self.load.queued_tokens + self.unseen_tokens

    @property
    def kv_usage(self) -> float:
        if self.shape is None or not self.shape.blocks_total:
            return 0.0
        free = self.load.blocks_free - self.unseen_kv_tokens / self.shape.block_tokens
        return min(1.0, max(0.0, 1.0 - free / self.shape.blocks_total))

    @property
    def num_open(self) -> int:
        return len(self._open)

    def prompt_s(self, new_tokens: float, total_tokens: float) -> float:
        """Predicted: computing a prompt here, alone."""
        steps = self.steps
        chunks = -(-new_tokens // self.step_tokens)
        return steps.a * chunks + steps.b * new_tokens + steps.c * new_tokens * (total_tokens - new_tokens / 2)

    def queue_s(self) -> float:
        """Predicted: computing all prompts that the last report and the dispatches after it speak of."""
        tokens = self.queued_tokens
        return self.steps.seconds(tokens, self.load.queued_pairs + self.unseen_pairs, -(-tokens // self.step_tokens))

    # -- own dispatches ------------------------------------------------------------------------------------------------

    def open(self, dispatch_id: int, charge: Charge, now_s: float) -> None:
        self._open[dispatch_id] = (charge, False)
        self._count(charge, 1)
        if charge.prompt_tokens:
            chunks = -(-charge.prompt_tokens // self.step_tokens)
            self.free_at_s = max(now_s, self.free_at_s) + self.steps.seconds(charge.prompt_tokens, charge.prompt_pairs, chunks)

    def close(self, dispatch_id: int, now_s: float) -> None:
        """Idempotent."""
        charge, seen = self._open.pop(dispatch_id, (None, True))
        if charge is None:
            return
        if not seen:
            self._count(charge, -1)
        if not self.reporting and not self.unseen_tokens:
            self.free_at_s = min(self.free_at_s, now_s)

    def prefilled(self, dispatch_id: int, now_s: float) -> None:
        """The prompt of this dispatch has been computed; what it holds stays."""
        charge, seen = self._open.get(dispatch_id, (None, True))
        if charge is None or not charge.prompt_tokens:
            return
        held = replace(charge, prompt_tokens=0, prompt_pairs=0.0)
        self._open[dispatch_id] = (held, seen)
        if not seen:
            self._count(charge, -1)
            self._count(held, 1)
        if not self.reporting and not self.unseen_tokens:
            self.free_at_s = min(self.free_at_s, now_s)

    def _count(self, charge: Charge, sign: int) -> None:
        self.unseen_requests += sign * charge.requests
        self.unseen_tokens += sign * charge.prompt_tokens
        self.unseen_pairs += sign * charge.prompt_pairs
        self.unseen_sequences += sign * charge.sequences
        self.unseen_kv_tokens += sign * charge.kv_tokens

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, report: WorkerReport, now_s: float) -> bool:
        """Takes the load of a report over. False if it is older than what is known: then nothing changes."""
        if report.shape is not None:
            self.break_off()  # a whole picture: what it does not name, it does not count
            self.shape = report.shape
        elif report.sequence <= self.sequence:
            return False
        self.reporting = True
        self.sequence = report.sequence
        self.load = report.load
        self.reported_s = now_s
        self._mark_seen(report.dispatches)
        for step in report.steps:
            self.steps.learn(step.tokens, step.pairs, step.seconds)
        self.free_at_s = now_s + self.queue_s()
        return True

    def break_off(self) -> None:
        """No report will come: what the last one counted of our dispatches is counted here again."""
        self.reporting = False
        self.sequence = 0
        self.load = _NOTHING
        for dispatch_id, (charge, seen) in self._open.items():
            if seen:
                self._open[dispatch_id] = (charge, False)
                self._count(charge, 1)

    def _mark_seen(self, dispatch_ids: Iterable[int]) -> None:
        for dispatch_id in dispatch_ids:
            charge, seen = self._open.get(dispatch_id, (None, True))
            if charge is not None and not seen:
                self._open[dispatch_id] = (charge, True)
                self._count(charge, -1)
