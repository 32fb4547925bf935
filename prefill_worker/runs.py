"""Every `Prefill.Run` of a worker, without the gRPC around it: chunks for the engine, blocks for the hand-off, a seal as answer.

The life of a run:
  1. the ticket is checked and its transfer opened; nothing is computed for a ticket that is not good
  2. the prompt is submitted to the engine
  3. what becomes final is pushed while the engine goes on: groups of layers of a chunk, then the next chunk
  4. when the last block was written, the seal goes back as the reply
However it ends, the engine stops computing this prompt within one step, or within a layer if no other prompt is in that step, and
its blocks are given back when nobody reads them.

It knows neither sockets nor threads: the engine is what takes posts and reports events, whatever runs it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from common.clock import Clock
from common.codec import request_from_wire, sampled_token_to_wire, ticket_from_wire, token_logprob_to_wire
from common.engine.grammar import CompiledGrammar
from common.engine.loop import Inbox
from common.errors import DeadlineExceeded, EngineFailure, PdserveError, TicketRefused
from common.metrics import WorkerMetrics
from common.tracing.span import current_span
from common.types import Request, Ticket
from common.wire import worker_pb2
from prefill_worker.handoff import PrefillHandoff, Push
from prefill_worker.scheduler import Event, LayersComputed, PrefillScheduler, PromptComputed, PromptFailed


class PrefillRuns:
    """One per worker; lives on its asyncio loop. `check` refuses what the engine cannot hold, with a RequestError."""

    def __init__(
        self,
        scheduler: PrefillScheduler,
        inbox: Inbox,
        handoff: PrefillHandoff,
        *,
        check: Callable[[Request], None],
        compile_grammar: Callable[[Request], Awaitable[CompiledGrammar | None]],
        metrics: WorkerMetrics,
        clock: Clock,
    ) -> None:
        self._scheduler = scheduler
        self._inbox = inbox
        self._handoff = handoff
        self._check = check
        self._compile_grammar = compile_grammar
        self._metrics = metrics
        self._clock = clock
        self._serial = itertools.count()
        self._news: dict[str, asyncio.Queue[Event | PdserveError]] = {}
        self._giving_back: set[asyncio.Task[None]] = set()
        self._failure: PdserveError | None = None

    async def run(self, message: worker_pb2.PrefillRequest) -> worker_pb2.PrefillReply:
        """Ends in the seal or in a PdserveError. Cancelling it stops the computation within one step."""
        request = request_from_wire(message.request)
        tickets = [ticket_from_wire(ticket) for ticket in (message.ticket, *message.rank_tickets)]
        left_s = min(request.timeout_s, *(ticket.ttl_s for ticket in tickets))
        if left_s <= 0:
            raise DeadlineExceeded("the prompt's time was over when it came")
        deadline_s = self._clock.monotonic_s() + left_s
        try:
            async with asyncio.timeout(left_s):
                return await self._run(request, tickets, deadline_s, message.wants_row)
        except TimeoutError as error:
            raise DeadlineExceeded("the prompt was not computed in time") from error

    def deliver(self, events: list[Event]) -> None:
        """What the engine reports, in order."""
        for event in events:
            news = self._news.get(event.request_id)
            if news is not None:
                news.put_nowait(event)

    def engine_failed(self, error: PdserveError | None = None) -> None:
        """No run can be computed any more: all of them end, and those to come; in `error`, if what happened has a name."""
        self._failure = error or EngineFailure("the prefill engine failed")
        for news in self._news.values():
            news.put_nowait(self._failure)

    async def wait_given_back(self) -> None:
        """Returns when every ended run has given its blocks back."""
        if self._giving_back:
            await asyncio.wait(self._giving_back)

    # -- one run -------------------------------------------------------------------------------------------------------

    async def _run(
        self, request: Request, tickets: Sequence[Ticket], deadline_s: float, wants_row: bool
    ) -> worker_pb2.PrefillReply:
        if self._failure is not None:
            raise self._failure
        self._check(request)
        ticket = tickets[0]
        if ticket.request_id != request.request_id or ticket.num_tokens != request.num_prompt_tokens:
            raise TicketRefused("the ticket is for another prompt", param="request_id")
        grammar = await self._compile_grammar(request)
        push = await self._handoff.begin(tickets)
        # A client may use a request id twice at a time; the engine must not.
        key = f"{request.request_id}#{next(self._serial)}"
        news: asyncio.Queue[Event | PdserveError] = asyncio.Queue()
        self._news[key] = news
        received_s = self._clock.monotonic_s()
        submitted = replace(request, request_id=key, timeout_s=deadline_s - received_s)
        self._inbox.post(self._scheduler.submit, submitted, grammar, wants_row, received_s)
        try:
            computed = await self._push_while_computing(news, push)
            computed_s = self._clock.monotonic_s()
            account = await push.finish()
        finally:
            del self._news[key]
            self._scheduler.give_up(key)
            self._inbox.post(self._scheduler.stop, key)
            self._spawn_give_back(push, key)
        self._trace(received_s, computed)
        self._metrics.queue_s.observe(computed.queue_s)
        self._metrics.prefill_s.observe(computed.prefill_s)
        self._metrics.transfer_bytes.inc(account.bytes)
        self._metrics.transfer_blocks.inc(account.num_blocks)
        self._metrics.finished("handed_off")
        return worker_pb2.PrefillReply(
            nonce=ticket.nonce,
            num_tokens=request.num_prompt_tokens,
            digests=_digests_to_wire(account.digests[ticket.nonce]),
            rank_seals=[
                worker_pb2.RankSeal(nonce=other.nonce, digests=_digests_to_wire(account.digests[other.nonce]))
                for other in tickets[1:]
            ],
            first_tokens=[sampled_token_to_wire(token) for token in computed.first_tokens],
            prompt_logprobs=[token_logprob_to_wire(item) for item in computed.prompt_logprobs],
            cached_tokens=computed.cached_tokens,
            queue_s=computed.queue_s,
            prefill_s=computed.prefill_s,
            tail_s=self._clock.monotonic_s() - computed_s,
            transfer_s=account.transfer_s,
            work_s=computed.work_s,
            row=b"" if computed.row is None else computed.row.to_bytes(),
        )

    async def _push_while_computing(self, news: asyncio.Queue[Event | PdserveError], push: Push) -> PromptComputed:
        while True:
            event = await news.get()  # bounded by the ticket's time
            match event:
                case LayersComputed():
                    if event.first_layer == 0:
                        current_span().event("chunk", {"pdserve.tokens": event.num_tokens})
                    await push.computed(event.num_tokens, event.blocks, event.first_layer, event.end_layer)
                case PromptComputed():
                    return event
                case PromptFailed():
                    raise event.error
                case PdserveError():
                    raise event

    def _trace(self, received_s: float, computed: PromptComputed) -> None:
        span = current_span()
        if not span:
            return
        started_s = received_s + computed.queue_s
        span.child("queue", start_s=received_s).end(at_s=started_s)
        compute = span.child("compute", start_s=started_s, attributes={"pdserve.cached_tokens": computed.cached_tokens})
        compute.end(at_s=started_s + computed.prefill_s)

    def _spawn_give_back(self, push: Push, key: str) -> None:
        async def give_back() -> None:
            await push.abort()
            self._inbox.post(self._scheduler.release, key)

        task = asyncio.get_running_loop().create_task(give_back(), name="give-back")
        self._giving_back.add(task)
        task.add_done_callback(self._giving_back.discard)


def _digests_to_wire(digests: Mapping[int, bytes]) -> list[worker_pb2.BlockDigest]:
    return [worker_pb2.BlockDigest(logical_block=logical, digest=digest) for logical, digest in digests.items()]
