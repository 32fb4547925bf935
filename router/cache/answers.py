"""Between a call and the workers: every request is answered from the store, by joining an answer in the making, or afresh.

    bypass, ineligible ───────────────────────────────────────────────> source
    key ─> exact look-up, which also reads the epochs ──hit──> replay
              │ miss
              ├─> a flight with this key, begun under these epochs: listen         (repeatable requests only)
              ├─> semantic look-up, if there is a question ──hit──> replay
              └─> a new flight, or, where answers must not be shared, the source itself; recorded, stored, learned

A hit never reaches the source, so it costs no admission and no worker. What makes two requests the same is in
`router.cache.digest`. An answer is stored with the epochs that were read before its making began, and is shared among requests
that read the same ones: what was begun before an invalidation is not given to those who ask after it. While the store is away
nothing is stored or shared, for nobody could say what has been invalidated.

If a flight fails because of somebody else's trouble (its worker was lost, the deadline of whoever started it), its listeners are
promoted: the first starts it anew, the others join, each goes on after what it has handed on. This happens a few times at most.

One per router. Knows no HTTP, no text beyond what recordings need, and nothing of workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from common.clock import Clock
from common.config import CacheConfig
from common.errors import AnswerNotCached, CapacityError, PdserveError, RequestEnded
from common.metrics import RouterMetrics
from common.types import FinishReason, Request, StageTimings, Started
from router.cache.control import CacheControl
from router.cache.digest import AnswerKey, answer_key
from router.cache.entry import NO_WORKER, Entry, Recording, decode, encode, replay
from router.cache.flight import Flight, TokenSource
from router.cache.names import epoch_names
from router.cache.question import question_of
from router.cache.report import CacheReport, CacheResult
from router.cache.semantic_port import FreshAnswer, Question, SemanticLookup
from router.cache.shown import Shown
from router.dispatch import Admission, DispatchEvent
from router.store.base import Epochs, Store
from router.validate import ValidCall

_VERIFYING = 2  # flights at a time that nobody waits for
_PROMOTIONS = 2  # generations after the first that one listener may go through

_Place = tuple[bytes, Epochs | None, str]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that the cache has to do with."""

    call: ValidCall
    request: Request
    index: int  # of the request in the call
    control: CacheControl
    source: TokenSource
    key: AnswerKey
    names: tuple[str, ...]  # of the epochs that the answer depends on
    exact: bool  # whether an answer may be given to an equal request
    question: Question | None
    deadline_s: float
    epochs: Epochs | None = None  # None: not read yet, or the store is away


class AnswerCache:
    """`draining` tells that the router is going away, so that nothing is started again. `close` ends all flights."""

    def __init__(
        self,
        config: CacheConfig,
        *,
        store: Store,
        semantics: SemanticLookup,
        clock: Clock,
        metrics: RouterMetrics,
        draining: Callable[[], bool],
    ) -> None:
        self._config = config.exact
        self._store = store
        self._semantics = semantics
        self._clock = clock
        self._metrics = metrics
        self._draining = draining
        self._flights: dict[_Place, Flight] = {}  # those that can be joined
        self._unended: set[Flight] = set()
        self._verifying: set[Flight] = set()

    async def events(
        self, call: ValidCall, index: int, control: CacheControl, source: TokenSource, report: CacheReport
    ) -> AsyncGenerator[DispatchEvent, None]:
        """The events of one request of a call, as a worker would send them; `source` is who asks workers for this call.
        Writes the report before the first event."""
        async with aclosing(await self._way(call, index, control, source, report)) as events:
            async for event in events:
                yield event

    async def forget(self, names: Sequence[str], answer_id: str | None) -> None:
        """When this returns no router answers from what depends on one of the names, nor with that answer. Raises what the store
        raises if it cannot promise that."""
        if answer_id is not None:
            await self._store.delete([bytes.fromhex(answer_id)])
        if names:
            await self._store.invalidate(names)

    async def close(self) -> None:
        """Ends what is still in flight; its listeners get a typed error."""
        await asyncio.gather(*(flight.close() for flight in tuple(self._unended)))

    async def _way(
        self, call: ValidCall, index: int, control: CacheControl, source: TokenSource, report: CacheReport
    ) -> AsyncGenerator[DispatchEvent, None]:
        """Decides where the events come from, and counts the decision."""
        request = call.requests[index]
        asked = self._asked(call, index, control, source, report)
        if asked is not None:
            asked, entry = await self._look_up(asked, report)
            if entry is not None:
                self._count(request, report)
                self._count_saved(request, entry.num_tokens)
                return replay(entry, num_prompt_tokens=request.num_prompt_tokens, now_s=self._clock.monotonic_s())
        if control.only_if_cached:
            self._count(request, report)
            raise AnswerNotCached("the cache has no answer to this, and only the cache was to be asked", param="Cache-Control")
        if asked is not None and self._shares(asked):
            return self._shared(asked, report)
        self._count(request, report)
        return source.generate(request) if asked is None else self._alone(asked)

    # -- what the request is to the cache ------------------------------------------------------------------------------

    def _asked(
        self, call: ValidCall, index: int, control: CacheControl, source: TokenSource, report: CacheReport
    ) -> _Asked | None:
        """None: the cache has nothing to do with it, for the reason in the report."""
        config, kind, request = self._config, call.sampling_class, call.requests[index]
        similar = self._semantics.covers(kind) and len(call.requests) == 1
        exact = config.enabled and (kind.repeatable or config.sampled)
        if control.bypass:
            report.result, report.reason = CacheResult.BYPASS, "asked"
            return None
        report.result, report.reason = CacheResult.INELIGIBLE, "sampled" if config.enabled else "off"
        if not exact and not similar:
            return None
        if not call.model.fingerprint:
            report.reason = "revision"  # there is no telling whose weights would answer
            return None
        names = epoch_names(call.model.name, request.cache_salt, control.tags)
        key = answer_key(call, index, names)
        question = question_of(call, key.key, names) if similar else None
        if not exact and question is None:
            return None
        report.result, report.reason = CacheResult.MISS, "absent" if control.look_up else "no-cache"
        deadline_s = self._clock.monotonic_s() + request.timeout_s
        return _Asked(call, request, index, control, source, key, names, exact, question, deadline_s)

    def _shares(self, asked: _Asked) -> bool:
        control = asked.control
        return asked.exact and self._config.coalesce and control.look_up and control.store and asked.epochs is not None

    def _count(self, request: Request, report: CacheReport) -> None:
        self._metrics.cache_requests.labels(request.model, str(report.result), report.reason).inc()

    def _count_saved(self, request: Request, num_tokens: int) -> None:
        self._metrics.cache_saved_tokens.labels(request.model, "prompt").inc(request.num_prompt_tokens)
        self._metrics.cache_saved_tokens.labels(request.model, "generation").inc(num_tokens)

    # -- from the store ------------------------------------------------------------------------------------------------

    async def _look_up(self, asked: _Asked, report: CacheReport) -> tuple[_Asked, Entry | None]:
        """The request with its epochs, and an answer that serves it; the report then tells of it."""
        with self._metrics.cache_lookup_s.labels("exact").time():
            reading = await self._store.get(asked.key.key, asked.names)
            if reading.epochs is None:
                report.reason = "store"
                return asked, None
            asked = replace(asked, epochs=reading.epochs)
            entry = self._exact_answer(asked, asked.key.key, reading.value, report)
            if entry is None and asked.control.look_up and asked.exact and not self._can_join(asked):
                reading = await self._store.get(asked.key.limited, asked.names)
                entry = self._exact_answer(asked, asked.key.limited, reading.value, report)
        if entry is None and asked.question is not None and asked.control.look_up and not self._can_join(asked):
            with self._metrics.cache_lookup_s.labels("semantic").time():
                entry = await self._similar_answer(asked, asked.question, report)
        if entry is not None:
            report.age_s, report.reason = self._age_s(entry), ""
        return asked, entry

    def _can_join(self, asked: _Asked) -> bool:
        return self._shares(asked) and not asked.control.only_if_cached and _place(asked) in self._flights

    def _exact_answer(self, asked: _Asked, key: bytes, value: bytes | None, report: CacheReport) -> Entry | None:
        if not asked.exact or not asked.control.look_up:
            return None
        entry = self._usable(asked, value, report, for_any_limit=key == asked.key.key)
        if entry is not None:
            report.result, report.answer_id = CacheResult.HIT_EXACT, key.hex()
        return entry

    async def _similar_answer(self, asked: _Asked, question: Question, report: CacheReport) -> Entry | None:
        hit = await self._semantics.find(question)
        if hit is None:
            return None
        reading = await self._store.get(hit.key, asked.names)
        entry = self._usable(asked, reading.value, report, for_any_limit=True)
        if entry is None:
            self._semantics.unusable(question, hit)
            return None
        report.result, report.answer_id, report.score = CacheResult.HIT_SEMANTIC, hit.hit_id, hit.score
        if hit.verify:
            self._verify(asked)
        return entry

    def _verify(self, asked: _Asked) -> None:
        """Computes the answer that the hit stood in for, which nobody waits for. Few at a time, and none while draining."""
        self._verifying = {flight for flight in self._verifying if not flight.ended}
        asked = replace(asked, source=asked.source.in_background())
        if len(self._verifying) < _VERIFYING and not self._draining() and _place(asked) not in self._flights:
            self._verifying.add(self._start(asked))

    def _usable(self, asked: _Asked, value: bytes | None, report: CacheReport, *, for_any_limit: bool) -> Entry | None:
        """`for_any_limit`: the key that it was found under does not tell the limit."""
        entry = None if value is None else decode(value)
        if entry is None or len(entry.choices) != asked.request.num_choices:
            return None
        if for_any_limit and not entry.serves(asked.request.sampling.max_tokens):
            return None
        if asked.control.max_age_s is not None and self._age_s(entry) > asked.control.max_age_s:
            report.reason = "max-age"
            return None
        return entry

    def _age_s(self, entry: Entry) -> float:
        return max(0.0, self._clock.wall_s() - entry.created_s)

    def _keep(self, asked: _Asked, recording: Recording) -> None:
        """Called with every complete answer; stores what may be stored, without waiting."""
        if asked.epochs is None or not asked.control.store:
            return
        entry = recording.entry(self._clock.wall_s())
        if entry.num_tokens < self._config.min_tokens:
            return
        key = asked.key.key if entry.ended_by_itself else asked.key.limited
        self._store.put(key, encode(entry), ttl_s=self._config.ttl_s, epochs=asked.epochs)
        if asked.question is not None:
            finish = FinishReason.STOP if entry.ended_by_itself else FinishReason.LENGTH
            fresh = FreshAnswer(key, recording.text, entry.num_tokens, finish, asked.names, asked.epochs, self._config.ttl_s)
            self._semantics.learn(asked.question, fresh)

    # -- afresh --------------------------------------------------------------------------------------------------------

    async def _alone(self, asked: _Asked) -> AsyncGenerator[DispatchEvent, None]:
        """An answer of this request's own, recorded on its way."""
        recording = self._recording(asked)
        async with aclosing(asked.source.generate(asked.request)) as events:
            async for event in events:
                recording.add(event)
                if recording.complete:
                    self._keep(asked, recording)
                yield event
                if recording.complete:
                    return

    async def _shared(self, asked: _Asked, report: CacheReport) -> AsyncGenerator[DispatchEvent, None]:
        """The events of a flight, of another one if that fails, and so on; each token once."""
        shown = Shown()
        admitted = False
        for promotions_left in reversed(range(1 + _PROMOTIONS)):
            flight = self._flights.get(_place(asked))
            follows = flight is not None
            if flight is None:
                flight = self._start(asked)
            if promotions_left == _PROMOTIONS:
                if follows:
                    report.result, report.reason = CacheResult.COALESCED, ""
                self._count(asked.request, report)
            shown.rewind()
            try:
                async with aclosing(flight.listen(asked.deadline_s)) as events:
                    async for event in events:
                        rest = shown.rest_of(event)
                        admission = None if admitted or event.admission is None else event.admission
                        if admission is not None and follows:
                            admission = self._without_worker(asked.request, admission)
                        if rest.chunks:
                            if admission is not rest.admission or (follows and rest.cost is not None):
                                rest = replace(rest, admission=admission, cost=None if follows else rest.cost)
                            yield rest
                            admitted = True
                if report.result is CacheResult.COALESCED:
                    self._count_saved(asked.request, shown.num_tokens)
                return
            except PdserveError as error:
                if not follows or promotions_left == 0 or not self._promotes(asked, error):
                    raise

    def _start(self, asked: _Asked) -> Flight:
        place = _place(asked)

        def leave(flight: Flight) -> None:
            if self._flights.get(place) is flight:
                del self._flights[place]
            if flight.ended:
                self._unended.discard(flight)

        flight = Flight(
            asked.request,
            asked.source,
            self._recording(asked),
            clock=self._clock,
            on_complete=lambda recording: self._keep(asked, recording),
            on_leave=leave,
        )
        self._flights[place] = flight
        self._unended.add(flight)
        return flight

    def _promotes(self, asked: _Asked, failure: PdserveError) -> bool:
        """Whether a listener is to try again what failed for another: not where there is no room, nor when its time is over."""
        another = failure.retryable and not isinstance(failure, CapacityError)
        return (
            (another or isinstance(failure, RequestEnded))
            and not self._draining()
            and self._clock.monotonic_s() < asked.deadline_s
        )

    def _without_worker(self, request: Request, admission: Admission) -> Admission:
        """Nobody worked for this request: its prompt counts as cached, and its time until here as the router's."""
        started = Started(StageTimings(), request.num_prompt_tokens, admission.started.prompt_logprobs)
        return Admission(started, NO_WORKER, self._clock.monotonic_s(), retries=0)

    def _recording(self, asked: _Asked) -> Recording:
        return Recording(asked.call, asked.index, with_text=asked.question is not None)


def _place(asked: _Asked) -> _Place:
    """What requests have in common that may share an answer in the making."""
    return asked.key.limited, asked.epochs, asked.source.lane
