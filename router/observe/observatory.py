"""What the router has seen: its last requests one by one, and its last quarter of an hour second by second.

    begin(...) -> Sighting ── the front end notes whose it is, and which generation ──> end(sighting, status, failure) -> record

Fed where a call begins and where it has ended; nothing is done per token. What comes in between (tokens of answers in progress)
is read off the generations once a second. Memory is bounded: so many records, so many seconds, and a second holds counts only.

One per router; lives on its loop. `run` closes the seconds until it is cancelled. No prompt, answer or key ever gets in here.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from common.clock import Clock
from common.config import RouterConfig, SloConfig
from common.errors import PdserveError
from common.metrics import CostReadings, ObserveMetrics, ObserveReadings, PromiseReadings
from common.tracing.span import NO_SPAN, Span
from common.tracing.tracer import ReadHeader, Tracer
from router.admission.gate import Lines
from router.admission.tenants import Standing
from router.generation import Generation
from router.observe.cost import NOTHING, CostSplit, Ledger, Ledgers, price
from router.observe.fairness import FairnessWindow
from router.observe.quantiles import Sketch
from router.observe.records import ActiveRequest, RequestRecord, Second, SloCount, Stage
from router.observe.slo import CLIENT_LEFT, kept
from router.observe.spans import describe_answer, describe_call, operation_of

RECORDS = 500
SECONDS = 15 * 60
_RATIO_SECONDS = 5 * 60  # over which the share of kept promises is shown
_UNAUTHENTICATED = 401  # anybody could fill the records with those


class Sighting:
    """One call in progress. Its front end writes what it learns."""

    def __init__(self, serial: int, request_id: str, endpoint: str, received_s: float, started_at_s: float) -> None:
        self.serial = serial
        self.request_id = request_id
        self.endpoint = endpoint
        self.received_s = received_s
        self.started_at_s = started_at_s
        self.standing: Standing | None = None
        self.generation: Generation | None = None  # the last one, if several models were asked
        self.error = ""  # name of the error's class, once it has ended in one
        self.span: Span = NO_SPAN

    @property
    def num_tokens(self) -> int:
        return 0 if self.generation is None else self.generation.usage.completion_tokens


class Observatory:
    """`lines` are who waits for a worker now, by model and band."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        lines: Callable[[], Iterable[Lines]],
        ledgers: Ledgers,
        tracer: Tracer,
        clock: Clock,
        metrics: ObserveMetrics,
    ) -> None:
        self._promises: Mapping[str, SloConfig] = {str(band): promise for band, promise in config.slo.items()}
        self._prices = config.prices
        self._lines = lines
        self._ledgers = ledgers
        self._tracer = tracer
        self._fairness: defaultdict[tuple[str, str], FairnessWindow] = defaultdict(FairnessWindow)
        self._clock = clock
        self._metrics = metrics
        self._serials = itertools.count()
        self._active: dict[int, Sighting] = {}
        self._records: deque[RequestRecord] = deque(maxlen=RECORDS)
        self._seconds: deque[Second] = deque(maxlen=SECONDS)
        self._ended_tokens = 0  # of answers that have ended
        self._counted_tokens = 0  # of all, up to the last second
        self._filling = _Filling(clock)
        self._news = asyncio.Event()
        metrics.read_from(self.readings)

    # -- what is known -------------------------------------------------------------------------------------------------

    def requests(self) -> tuple[RequestRecord, ...]:
        """The last ones that have ended, the newest first."""
        return tuple(reversed(self._records))

    def request(self, request_id: str) -> RequestRecord | None:
        """The last one with this id."""
        return next((record for record in reversed(self._records) if record.request_id == request_id), None)

    def active(self) -> tuple[ActiveRequest, ...]:
        """Those in progress, the oldest first."""
        return tuple(self._as_active(sighting) for sighting in self._active.values())

    def series(self, *, after_s: float = 0.0) -> tuple[Second, ...]:
        """The seconds that are over, the oldest first; those that began after a time by the wall clock."""
        return tuple(second for second in self._seconds if second.at_s > after_s)

    async def next_second(self) -> Second:
        """Returns when the second that is being filled is over."""
        await self._news.wait()
        return self._seconds[-1]

    def readings(self) -> ObserveReadings:
        """For a scrape."""
        return ObserveReadings(
            promises=self._promise_readings(),
            costs=tuple(self._cost_readings(model, ledger) for model, ledger in self._ledgers.all()),
            fairness={key: index for key, window in self._fairness.items() if (index := window.index) is not None},
        )

    def _cost_readings(self, model: str, ledger: Ledger) -> CostReadings:
        seconds, tokens = ledger.seconds, ledger.tokens
        money = price(seconds, prefill_hour=self._prices.prefill_hour, decode_hour=self._prices.decode_hour)
        return CostReadings(
            model,
            seconds=seconds.parts,
            saved_s=seconds.saved_s,
            tokens=asdict(tokens),
            money=money.parts if self._prices.given else {},
            saved_money=money.saved_s,
        )

    def _promise_readings(self) -> tuple[PromiseReadings, ...]:
        recent = tuple(itertools.islice(reversed(self._seconds), _RATIO_SECONDS))
        length_s = sum(second.length_s for second in recent)
        readings: list[PromiseReadings] = []
        for name in self._promises:
            counts = [count for second in recent if (count := second.slo.get(name)) is not None]
            met, missed = sum(count.met for count in counts), sum(count.missed for count in counts)
            ratio = SloCount(met, missed).ratio
            readings.append(PromiseReadings(name, math.nan if ratio is None else ratio, met / length_s if length_s else 0.0))
        return tuple(readings)

    # -- what it is told -----------------------------------------------------------------------------------------------

    def begin(self, request_id: str, endpoint: str, received_s: float, header: ReadHeader) -> Sighting:
        """`header` may name the trace that the call is part of."""
        sighting = Sighting(next(self._serials), request_id, endpoint, received_s, self._clock.wall_s())
        sighting.span = self._tracer.serve(operation_of(endpoint), header, start_s=received_s)
        self._active[sighting.serial] = sighting
        return sighting

    def end(self, sighting: Sighting, status: int, failure: PdserveError | None) -> None:
        """The call is over, with what HTTP calls a status."""
        sighting.error = "" if failure is None or status == CLIENT_LEFT else failure.code
        del self._active[sighting.serial]
        record = self._record(sighting, status)
        if sighting.span:
            self._end_span(sighting, record)
        if status == _UNAUTHENTICATED:
            return
        self._records.append(record)
        self._ended_tokens += record.completion_tokens
        self._filling.add(record)
        self._metrics.ended(
            record.model,
            slo=record.slo,
            met=record.slo_met,
            unexplained_ratio=record.unexplained_s / record.ttft_s if record.decode_worker and record.ttft_s else None,
            tokens=(record.prompt_tokens, record.completion_tokens) if record.ended_well else None,
        )

    async def run(self) -> None:
        """Closes each second when it is over, until it is cancelled."""
        due_s = self._clock.monotonic_s() + 1.0
        while True:
            await asyncio.sleep(max(0.0, due_s - self._clock.monotonic_s()))
            delay_s = max(0.0, self._clock.monotonic_s() - due_s)
            self._metrics.loop_delay_s.observe(delay_s)
            self.tick(delay_s)
            due_s += 1.0 + math.floor(delay_s)

    def tick(self, loop_delay_s: float = 0.0) -> None:
        """The second that was being filled is over."""
        tokens = self._ended_tokens + sum(sighting.num_tokens for sighting in self._active.values())
        second = self._filling.close(
            in_flight=len(self._active),
            queued=self._look_at_lines(),
            tokens=max(0, tokens - self._counted_tokens),
            loop_delay_s=loop_delay_s,
        )
        self._counted_tokens = max(tokens, self._counted_tokens)
        self._seconds.append(second)
        self._filling = _Filling(self._clock)
        self._news.set()
        self._news = asyncio.Event()

    def _look_at_lines(self) -> int:
        """How many requests wait; takes note of how evenly they are served."""
        total = 0
        for lines in self._lines():
            total += lines.num_requests
            self._fairness[lines.model, lines.band].look(lines.counters)
        return total

    # -- within --------------------------------------------------------------------------------------------------------

    def _record(self, sighting: Sighting, status: int) -> RequestRecord:
        standing, generation = sighting.standing, sighting.generation
        band = "" if standing is None else str(standing.band)
        total_s = self._clock.monotonic_s() - sighting.received_s
        answer: dict[str, Any] = {} if generation is None else self._of_answer(generation)
        promise = self._promises.get(band)
        met: bool | None = None
        if promise is not None:
            met = kept(promise, status=status, ttft_s=answer.get("ttft_s"), tpot_s=answer.get("tpot_s"), total_s=total_s)
        return RequestRecord(
            request_id=sighting.request_id,
            endpoint=sighting.endpoint,
            tenant="" if standing is None else standing.identity.tenant.label,
            band=band,
            started_at_s=sighting.started_at_s,
            status=status,
            error=sighting.error,
            total_s=total_s,
            slo="" if promise is None else band,
            slo_met=met,
            trace_id=sighting.span.trace_id,
            **answer,
        )

    def _of_answer(self, generation: Generation) -> dict[str, Any]:
        """Fields of a record."""
        model, usage, timings = generation.call.model.name, generation.usage, generation.timings
        fields: dict[str, Any] = {
            "model": model,
            "cache": generation.cache_result,
            "num_choices": generation.call.num_choices,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "cost": generation.settle(self._ledgers.of(model)),
        }
        if timings is not None:
            waterfall, worker = timings.waterfall, timings.waterfall.worker
            fields.update(
                queue_s=waterfall.queue_s,
                ttft_s=waterfall.ttft_s,
                tpot_s=waterfall.tpot_s if waterfall.num_output_tokens > 1 else None,
                stages=tuple(map(Stage._make, waterfall.stages())),
                transfer_hidden_s=worker.transfer_hidden_s,
                transport=worker.transport,
                transfer_bytes=worker.transfer_bytes,
                prefill_worker=worker.prefill_worker,
                decode_worker=timings.decode_worker,
                retries=timings.retries,
                unexplained_s=waterfall.unexplained_s,
                migrated_to=generation.migrated_to,
            )
        return fields

    def _end_span(self, sighting: Sighting, record: RequestRecord) -> None:
        span, generation = sighting.span, sighting.generation
        if not span:
            return
        if record.ttft_s is not None:
            span.child("first token", start_s=sighting.received_s).end(at_s=sighting.received_s + record.ttft_s)
        if generation is not None:
            describe_call(span, sighting.endpoint, generation.call)
        describe_answer(span, record, () if generation is None else generation.finish_reasons)
        span.end(error=record.error)

    def _as_active(self, sighting: Sighting) -> ActiveRequest:
        standing, generation = sighting.standing, sighting.generation
        timings = None if generation is None else generation.timings
        return ActiveRequest(
            request_id=sighting.request_id,
            endpoint=sighting.endpoint,
            model="" if generation is None else generation.call.model.name,
            tenant="" if standing is None else standing.identity.tenant.label,
            band="" if standing is None else str(standing.band),
            started_at_s=sighting.started_at_s,
            age_s=self._clock.monotonic_s() - sighting.received_s,
            ttft_s=None if timings is None else timings.waterfall.ttft_s,
            prompt_tokens=0 if generation is None else generation.call.num_prompt_tokens,
            completion_tokens=sighting.num_tokens,
            decode_worker="" if timings is None else timings.decode_worker,
        )


class _Filling:
    """The second in progress."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.monotonic_s()
        self._at_s = clock.wall_s()
        self._requests = self._failed = self._prompt_tokens = self._cached_tokens = self._cache_hits = 0
        self._ttft, self._tpot = Sketch(), Sketch()
        self._met: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()
        self._costs: list[CostSplit] = []

    def add(self, record: RequestRecord) -> None:
        self._requests += 1
        self._failed += record.status == 429 or record.status >= 500
        self._prompt_tokens += record.prompt_tokens
        self._cached_tokens += record.cached_tokens
        self._cache_hits += record.from_cache
        if record.ttft_s is not None:
            self._ttft.add(record.ttft_s)
        if record.tpot_s is not None:
            self._tpot.add(record.tpot_s)
        if record.slo_met is not None:
            (self._met if record.slo_met else self._missed)[record.slo] += 1
        if record.cost is not NOTHING:
            self._costs.append(record.cost)

    def close(self, *, in_flight: int, queued: int, tokens: int, loop_delay_s: float) -> Second:
        return Second(
            at_s=self._at_s,
            length_s=self._clock.monotonic_s() - self._began_s,
            requests=self._requests,
            failed=self._failed,
            in_flight=in_flight,
            queued=queued,
            tokens=tokens,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            cache_hits=self._cache_hits,
            ttft_p50_s=self._ttft.quantile(0.5),
            ttft_p99_s=self._ttft.quantile(0.99),
            tpot_p50_s=self._tpot.quantile(0.5),
            tpot_p99_s=self._tpot.quantile(0.99),
            slo={name: SloCount(self._met[name], self._missed[name]) for name in {*self._met, *self._missed}},
            cost=sum(self._costs, NOTHING),
            loop_delay_s=loop_delay_s,
        )
