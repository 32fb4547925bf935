"""Placement as the dispatcher, admission and the watch of workers see it.

    sync(views) ─┐
    report(...) ─┼─> fleet ── place(request, avoid) -> Placement ── open(...) -> Dispatched ── started, close
    break_off ───┘        └── forecast(model, prompt) -> Forecast

One per router. It lives on the router's loop, opens no connection, and takes its time and its dice from outside.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from common.blocks import block_key, hash_chain, root_hash
from common.clock import Clock
from common.config import PlacementConfig
from common.errors import NoWorkerAvailable
from common.load import WorkerReport
from common.types import PrefillChoice, Request, Role, Started, WorkerRef
from router.placement.fleet import Fleet, Pool
from router.placement.index import Match, slots_of
from router.placement.membership import EXPECTED_OUTPUT_TOKENS, Placement, Prompt, WorkerView
from router.placement.policies import POLICIES, Candidate, Policy
from router.placement.predicted import Option, decode_options, prefill_options
from router.placement.worker import Charge

_MAX_KEYS = 4096  # of one prompt; what comes behind them is not looked up
_MAX_CANDIDATES = 8
_LEARNT_STEPS, _LEARNT_HANDOFFS = 8, 2  # before a forecast is worth deciding by


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would become of a prompt that was dispatched now."""

    ttft_s: float  # from the dispatch on
    tpot_s: float
    typical_error: float  # of the time to the first token, relative; for the 90th percentile take twice as much on top
    room_tokens: int | None  # KV that is free on the decode workers together; None while none of them reports
    learnt: bool  # False: the figures rest on priors


@dataclass(frozen=True, slots=True)
class _Naming:
    """How blocks of a model are named."""

    layout_fingerprint: bytes
    block_tokens: int


class Placer:
    def __init__(self, config: PlacementConfig, *, clock: Clock, draw: random.Random | None = None) -> None:
        self._config = config
        self._clock = clock
        self._draw = draw or random.Random()
        self._ids = itertools.count(self._draw.getrandbits(31) << 32 | 1)
        self._naming: dict[tuple[str, Role], _Naming] = {}
        self._views: Sequence[WorkerView] = ()
        self.fleet = Fleet(max_blocks=config.index_blocks, speculative_ttl_s=config.speculative_ttl_s)

    def now_s(self) -> float:
        return self._clock.monotonic_s()

    # -- what comes in -------------------------------------------------------------------------------------------------

    def sync(self, views: Sequence[WorkerView]) -> None:
        """Takes a snapshot of the membership over; cheap when it is the last one."""
        if views is not self._views:
            self._views = views
            self.fleet.sync(views)

    def report(self, ref: WorkerRef, report: WorkerReport) -> bool:
        """False: a report is missing before this one, so the watch has to begin anew."""
        worker = self.fleet.workers.get(ref)
        if worker is not None and report.shape is not None and report.shape.prefix_cache:
            self._naming[worker.model, worker.role] = _Naming(report.shape.layout_fingerprint, report.shape.block_tokens)
        return self.fleet.report(ref, report, self._clock.monotonic_s())

    def break_off(self, ref: WorkerRef) -> None:
        self.fleet.break_off(ref)

    # -- decisions -----------------------------------------------------------------------------------------------------

    def prompt_of(self, request: Request) -> Prompt:
        """A request as its blocks, named as the workers of its model name them; without names while none has reported."""
        here, there = (self._naming.get((request.model, role)) for role in (Role.DECODE, Role.PREFILL))
        prompt = self._named(request, here or there)
        return (
            prompt if here is None or there is None or here == there else replace(prompt, elsewhere=self._named(request, there))
        )

    def _named(self, request: Request, naming: _Naming | None) -> Prompt:
        keys: tuple[int, ...] = ()
        if naming is not None and request.sampling.prompt_logprobs is None:  # those are computed with all their tokens
            root = root_hash(naming.layout_fingerprint, request.cache_salt)
            whole = request.prompt_token_ids[: _MAX_KEYS * naming.block_tokens]
            keys = tuple(block_key(block_hash) for block_hash in hash_chain(root, whole, naming.block_tokens))
        return Prompt(
            num_tokens=request.num_prompt_tokens,
            output_tokens=request.num_choices * min(request.sampling.max_tokens, EXPECTED_OUTPUT_TOKENS),
            num_choices=request.num_choices,
            block_tokens=naming.block_tokens if naming is not None else 0,
            keys=keys,
        )

    def place(self, model: str, prompt: Prompt, avoid: Collection[WorkerRef] = ()) -> Placement:
        """Raises NoWorkerAvailable if no decode worker of the model is ready."""
        decode = self.fleet.pool(model, Role.DECODE)
        if not len(decode):
            raise NoWorkerAvailable(f"no worker can serve {model} at the moment", retry_after_s=1.0)
        now_s = self._clock.monotonic_s()
        policy = POLICIES.get(self._config.policy)
        if policy is None:
            return self._predicted(model, prompt, avoid, now_s)
        matches = self._matches(prompt, now_s)
        (to, *_) = self._ranked(policy, decode, prompt, matches, avoid)
        prefill = self._ranked(policy, self.fleet.pool(model, Role.PREFILL), prompt, matches, avoid)
        return Placement(
            to.worker.ref,
            tuple(one.worker.ref for one in prefill[:_MAX_CANDIDATES]),
            decode_cached_tokens=to.cached_tokens,
            prefill_cached_tokens=prefill[0].cached_tokens if prefill else 0,
            reason=self._config.policy,
        )

    def decode_workers(self, model: str) -> list[WorkerRef]:
        """Those that are ready, least loaded first."""
        return [worker.ref for worker in self.fleet.pool(model, Role.DECODE)]

    def open(self, placement: Placement, model: str, prompt: Prompt) -> Dispatched:
        """From here on the dispatch counts. Close it, whatever comes of it."""
        dispatched = Dispatched(self, next(self._ids), placement, model, prompt, self._clock.monotonic_s())
        dispatched.charge()
        return dispatched

    def forecast(self, model: str, prompt: Prompt) -> Forecast | None:
        """What would become of this prompt now; None if nobody could serve it. Decides nothing."""
        now_s = self._clock.monotonic_s()
        ways = self._ways(model, prompt, (), now_s)
        if ways is None:
            return None
        worker = ways.decode.worker
        steps = worker.steps
        rooms = [room for one in self.fleet.pool(model, Role.DECODE) if (room := one.room_tokens) is not None]
        return Forecast(
            ttft_s=ways.ttft_s,
            tpot_s=worker.step_s + steps.b * prompt.num_choices + steps.c * prompt.num_tokens,
            typical_error=max(steps.typical_error, ways.prefill[0].worker.steps.typical_error if ways.prefill else 0.0),
            room_tokens=sum(rooms) if rooms else None,
            learnt=ways.learnt,
        )

    def predicted_ttft_s(self, request: Request) -> float | None:
        """Of a request that is dispatched now; None while the figures would rest on priors."""
        forecast = self.forecast(request.model, self.prompt_of(request))
        return forecast.ttft_s if forecast is not None and forecast.learnt else None

    # -- within --------------------------------------------------------------------------------------------------------

    def _matches(self, prompt: Prompt, now_s: float) -> dict[Role, Sequence[Match]]:
        """Who holds how many of its blocks, as each pool cuts them."""
        here = self.fleet.index.match(prompt.keys, now_s) if prompt.keys else []
        if prompt.elsewhere is None:
            return {Role.DECODE: here, Role.PREFILL: here}
        keys = prompt.elsewhere.keys
        return {Role.DECODE: here, Role.PREFILL: self.fleet.index.match(keys, now_s) if keys else []}

    def _predicted(self, model: str, prompt: Prompt, avoid: Collection[WorkerRef], now_s: float) -> Placement:
        ways = self._ways(model, prompt, avoid, now_s)
        if ways is None:
            raise NoWorkerAvailable(f"no worker can serve {model} at the moment", retry_after_s=1.0)
        choice = PrefillChoice.WORKER
        if ways.learnt and ways.prefill:
            choice = PrefillChoice.HERE if ways.local else PrefillChoice.THERE
        first = [option.worker.ref for option in ways.prefill]
        others = (worker.ref for worker in self.fleet.pool(model, Role.PREFILL) if worker.ref not in first)
        candidates = (*first, *itertools.islice(others, max(0, _MAX_CANDIDATES - len(first))))
        return Placement(
            ways.decode.worker.ref,
            candidates[:_MAX_CANDIDATES],
            choice,
            ttft_s=ways.ttft_s if ways.learnt else None,
            decode_cached_tokens=ways.decode.cached_tokens,
            prefill_cached_tokens=ways.prefill[0].cached_tokens if ways.prefill else 0,
            reason=ways.reason,
        )

    def _ways(self, model: str, prompt: Prompt, avoid: Collection[WorkerRef], now_s: float) -> _Ways | None:
        """The better of prefilling there and here; None without a decode worker."""
        matches = self._matches(prompt, now_s)
        externality = 0.0 if self._config.policy == "min_ttft" else self._config.externality
        handoff = self.fleet.handoff(model)
        prefill = prefill_options(
            self.fleet.pool(model, Role.PREFILL),
            prompt.at(Role.PREFILL),
            matches[Role.PREFILL],
            now_s,
            externality=externality,
            avoid=avoid,
        )
        pool = self.fleet.pool(model, Role.DECODE)
        here = matches[Role.DECODE]
        found = decode_options(pool, prompt, here, self.fleet.index, handoff, now_s, externality=externality, avoid=avoid)
        if found is None:
            return None
        remote, local = found
        learnt = min(remote.worker.steps.num_samples, local.worker.steps.num_samples) >= _LEARNT_STEPS
        if not prefill:
            return _Ways(local, (), local.ttft_s, True, learnt, "no prefill worker")
        learnt = learnt and prefill[0].worker.steps.num_samples >= _LEARNT_STEPS and handoff.num_samples >= _LEARNT_HANDOFFS
        there_s = prefill[0].cost_s + remote.cost_s
        here_s = local.cost_s
        shape = local.worker.shape
        allowed = shape is not None and shape.local_prefill != "never"
        reason = f"there {there_s * 1e3:.1f} ms, here {here_s * 1e3:.1f} ms"
        if learnt and allowed and here_s < there_s:
            return _Ways(local, tuple(prefill), local.ttft_s, True, learnt, reason)
        return _Ways(remote, tuple(prefill), prefill[0].ttft_s + remote.ttft_s, False, learnt, reason)

    def _ranked(
        self,
        policy: Policy,
        pool: Pool,
        prompt: Prompt,
        matches: Mapping[Role, Sequence[Match]],
        avoid: Collection[WorkerRef],
    ) -> list[Candidate]:
        if not len(pool):
            return []
        prompt = prompt.at(pool.role)
        blocks = {slot: match.num_blocks for match in matches[pool.role] for slot in slots_of(match.slots & pool.bits)}
        candidates = [Candidate(one, prompt.cached_tokens(blocks.get(one.slot, 0))) for one in pool]
        costs = policy(candidates, prompt, self._draw.random)
        ranked = sorted(
            zip(costs, candidates, strict=True),
            key=lambda pair: (pair[1].worker.ref in avoid, pair[0], pair[1].worker.last_used, pair[1].worker.slot),
        )
        return [candidate for _, candidate in ranked]


@dataclass(frozen=True, slots=True)
class _Ways:
    decode: Option
    prefill: tuple[Option, ...]
    ttft_s: float
    local: bool
    learnt: bool
    reason: str


class Dispatched:
    """One try of one request, from `open` until `close`."""

    def __init__(
        self, placer: Placer, dispatch_id: int, placement: Placement, model: str, prompt: Prompt, opened_s: float
    ) -> None:
        self.dispatch_id = dispatch_id
        self.placement = placement
        self._placer = placer
        self._model = model
        self._prompt = prompt
        self._opened_s = opened_s

    def charge(self) -> None:
        """Called once, by `open`."""
        fleet, placement, prompt = self._placer.fleet, self.placement, self._prompt
        sequences = prompt.num_choices
        kv_tokens = prompt.num_tokens + prompt.output_tokens
        new = prompt.num_tokens - placement.decode_cached_tokens
        here = placement.choice is PrefillChoice.HERE or not placement.prefill
        work = Charge.for_prefill(new, prompt.num_tokens) if here else Charge()
        fleet.open(placement.decode, self.dispatch_id, replace(work, sequences=sequences, kv_tokens=kv_tokens), self._opened_s)
        holders = [(placement.decode, prompt.keys)]
        if not here:
            new = prompt.num_tokens - placement.prefill_cached_tokens
            fleet.open(placement.prefill[0], self.dispatch_id, Charge.for_prefill(new, prompt.num_tokens), self._opened_s)
            holders.append((placement.prefill[0], prompt.at(Role.PREFILL).keys))
        for ref, keys in holders:
            worker = fleet.workers.get(ref)
            if worker is not None and keys:
                fleet.index.promise(worker.slot, keys, self._opened_s, self._opened_s + (placement.ttft_s or 0.0))

    def started(self, started: Started) -> None:
        """The first token is there: the prompt has been computed."""
        now_s = self._placer.now_s()
        self._placer.fleet.prefilled(self.placement.decode, self.dispatch_id, now_s)
        for ref in self.placement.prefill[:1]:
            self._placer.fleet.close(ref, self.dispatch_id, now_s)
        timings = started.timings
        if timings.transport:
            tokens = timings.transfer_blocks * self._prompt.block_tokens
            seconds = timings.transfer_exposed_s + timings.rpc_s + timings.activate_s
            self._placer.fleet.handoff(self._model).learn(tokens, seconds)

    def close(self) -> None:
        """Idempotent."""
        now_s = self._placer.now_s()
        for ref in (self.placement.decode, *self.placement.prefill[:1]):
            self._placer.fleet.close(ref, self.dispatch_id, now_s)
