"""Where a request goes: a pure function of the membership, of what is in flight from here, and of who is to be avoided.

Decode: the ready worker with the fewest outstanding tokens of ours; prefill: all ready workers in that order, as candidates. Ties
go to whoever was chosen less often, then to the lower worker id, so that an idle pool is used in turn. Workers to avoid (just
tried, or suspected dead) come last: they are still better than no answer.

`Ledger` is this router's account of its own dispatches; it knows nothing about what other routers do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from common.errors import NoWorkerAvailable
from common.types import Request, Role, WorkerRef, WorkerState

_EXPECTED_OUTPUT_TOKENS = 512  # an answer may be as long as the context, few are; more than this is not charged up front


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as the last snapshot of the registry tells it."""

    ref: WorkerRef
    role: Role
    model: str
    state: WorkerState
    max_model_tokens: int  # 0 = not known


@dataclass(frozen=True, slots=True)
class Placement:
    decode: WorkerRef
    prefill: tuple[WorkerRef, ...]  # in order of preference; empty = the decode worker prefills itself


@dataclass
class Ledger:
    """Outstanding tokens and number of dispatches per incarnation of a worker. Entries are made and closed by `dispatch`."""

    tokens: dict[WorkerRef, int] = field(default_factory=lambda: defaultdict(int))
    dispatches: dict[WorkerRef, int] = field(default_factory=lambda: defaultdict(int))

    def open(self, request: Request, placement: Placement) -> LedgerEntry:
        output = request.num_choices * min(request.sampling.max_tokens, _EXPECTED_OUTPUT_TOKENS)
        charges = {placement.decode: request.num_prompt_tokens + output}
        for ref in placement.prefill[:1]:  # the decode worker tries them in order, and may prefill itself
            charges[ref] = charges.get(ref, 0) + request.num_prompt_tokens
        for ref, tokens in charges.items():
            self.tokens[ref] += tokens
            self.dispatches[ref] += 1
        return LedgerEntry(self, placement, charges)

    def forget_absent(self, present: Collection[WorkerRef]) -> None:
        """Drops what is known of workers that are gone and have nothing in flight."""
        for ref in [ref for ref in self.dispatches if ref not in present and not self.tokens.get(ref)]:
            del self.dispatches[ref]
            self.tokens.pop(ref, None)


@dataclass
class LedgerEntry:
    """One dispatch's share of the ledger."""

    _ledger: Ledger
    _placement: Placement
    _charges: dict[WorkerRef, int]

    def prefilled(self) -> None:
        """The first token is there: the prefill worker is done with it. Idempotent."""
        for ref in [ref for ref in self._charges if ref != self._placement.decode]:
            self._ledger.tokens[ref] -= self._charges.pop(ref)

    def close(self) -> None:
        """Idempotent."""
        while self._charges:
            ref, tokens = self._charges.popitem()
            self._ledger.tokens[ref] -= tokens


def place(model: str, workers: Sequence[WorkerView], ledger: Ledger, avoid: Collection[WorkerRef]) -> Placement:
    """Raises NoWorkerAvailable if no decode worker of the model is ready."""

    def in_order(role: Role) -> list[WorkerRef]:
        ready = [view.ref for view in workers if (view.model, view.role, view.state) == (model, role, WorkerState.READY)]
        return sorted(
            ready,
            key=lambda ref: (ref in avoid, ledger.tokens.get(ref, 0), ledger.dispatches.get(ref, 0), ref.worker_id),
        )

    decode = in_order(Role.DECODE)
    if not decode:
        raise NoWorkerAvailable(f"no worker can serve {model} at the moment", retry_after_s=1.0)
    return Placement(decode[0], tuple(in_order(Role.PREFILL)))
