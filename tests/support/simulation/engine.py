"""An engine without a model, a thread or tensors, driven by the real scheduler: `common.engine.core` and `loop` on virtual time.

    post -> inbox -> (between steps) -> scheduler -> plan -> copies -> layers, one group after the other -> tokens -> events

A step takes time, and its groups of layers are reported while the later ones are still to come; posts and events cross to the
other thread with a delay of their own. Keys and values are written to the watched memory, and tokens are drawn from what is read
back from it (`support.simulation.oracle` says what must come out).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Any

from common.engine.batch import ForwardResult, ScheduledBatch, SequenceSlice, SliceResult
from common.engine.core import group_ends
from common.engine.in_flight_step import with_tokens_of
from common.types import SampledToken
from support.simulation.oracle import NUM_LAYERS, START, draw, kv_of_next
from support.simulation.pool import Memory
from support.simulation.pool_cut import PoolCut
from support.simulation.virtual_loop import ProcessLoop

THREAD_S = 50e-6  # at most, from one thread to the other


class StandInEngine:
    """An `Inbox` for the control logic."""

    def __init__(
        self,
        loop: ProcessLoop,
        scheduler: Any,
        memory: Memory,
        cut: PoolCut,
        deliver: Callable[[list[Any]], None],
        random: Callable[[], float],
        *,
        step_s: float,
        token_s: float,
        layer_groups: int,
        watched: bool,
        overlap: bool = False,
    ) -> None:
        """With `overlap` the scheduler plans a step while another is computed."""
        self._loop = loop
        self._scheduler = scheduler
        self._memory = memory
        self._cut = cut
        self._deliver = deliver
        self._random = random
        self._step_s, self._token_s = step_s, token_s
        self._group_ends = sorted(group_ends(NUM_LAYERS, layer_groups))
        self._watched = watched
        self._inbox: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._overlap = overlap
        self._plan: Any = None  # of the step under way
        self._batch = ScheduledBatch(())  # of that plan, with the tokens that placeholders stood for
        self._following: Any = None  # the plan behind it
        self._awake = False
        self._failed = False
        self.num_steps = 0

    @property
    def idle(self) -> bool:
        return not self._awake and not self._inbox

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        self._inbox.append((function, arguments))
        if not self._awake:
            self._awake = True
            self._loop.call_later(self._random() * THREAD_S, self._between_steps)

    def fail(self) -> None:
        """The thread has raised: nothing is computed any more, and posts are seen by nobody."""
        self._failed = True

    def _between_steps(self) -> None:
        if self._failed:
            return
        while self._inbox:
            function, arguments = self._inbox.popleft()
            function(*arguments)
        if self._plan is not None:
            self._hand_over()
            self._compute()
            return
        plan = self._scheduler.schedule()
        for source, destination in plan.copies:
            self._copy(source, destination)
        self._hand_over()
        if not plan.batch.slices:
            if self._scheduler.is_idle and self._memory.blocks is not None:
                self._memory.blocks.check_integrity()
            self._awake = False
            return
        self._plan, self._batch = plan, plan.batch
        self._compute()

    def _compute(self) -> None:
        self.num_steps += 1
        following = self._scheduler.schedule_ahead() if self._overlap else None
        self._following = None if isinstance(following, enum.Enum) else following
        self._hand_over()
        self._later_layers(0, 0)

    def _later_layers(self, first_layer: int, group: int) -> None:
        share_s = (self._step_s + self._token_s * self._batch.num_tokens) / len(self._group_ends)
        end_layer = self._group_ends[group]
        self._loop.call_later(share_s * (0.5 + self._random()), self._layers_done, first_layer, end_layer, group)

    def _layers_done(self, first_layer: int, end_layer: int, group: int) -> None:
        if self._failed:
            return
        plan = self._plan
        for item in self._batch.slices:
            self._write(item, first_layer, end_layer)
        if self._watched:
            self._scheduler.layers_computed(plan, first_layer, end_layer)
        if end_layer < NUM_LAYERS:
            self._hand_over()
            if self._watched and not self._scheduler.wants(plan):
                self._scheduler.stopped(plan)
                self._plan = None
                self._loop.call_later(self._random() * THREAD_S, self._between_steps)
            else:
                self._later_layers(end_layer, group + 1)
            return
        result = ForwardResult(tuple([self._sample(item) for item in self._batch.slices]))
        self._plan, self._following = self._following, None
        if self._plan is not None:
            self._batch = with_tokens_of(self._plan.batch, result)
        self._scheduler.complete(plan, result)
        self._hand_over()
        self._loop.call_later(self._random() * THREAD_S, self._between_steps)

    def _hand_over(self) -> None:
        events = self._scheduler.take_events()
        if events:
            self._loop.call_soon(self._deliver, events)

    # -- the model ----------------------------------------------------------------------------------------------------

    def _write(self, item: SequenceSlice, first_layer: int, end_layer: int) -> None:
        memory, cut, table, start = self._memory, self._cut, item.block_table, item.start
        content = memory.bytes
        memory.check_engine_use(table)
        for index in range(start // cut.block_tokens, (start + len(item.token_ids) - 1) // cut.block_tokens + 1):
            memory.check_engine_write(table[index])
        for layer in range(first_layer, end_layer):
            last = START if start == 0 else cut.read(content, table, layer, start - 1)
            for position, token_id in enumerate(item.token_ids, start=start):
                last = kv_of_next(last, layer, token_id)
                cut.write(content, table, layer, position, last)

    def _sample(self, item: SequenceSlice) -> SliceResult:
        if not item.samples:
            return SliceResult()
        end = item.start + len(item.token_ids)
        if not item.num_drafts:
            all_kv = self._all_kv(item, end)
            return SliceResult(
                tuple([SampledToken(draw(all_kv, spec.seed, spec.choice, spec.position)) for spec in item.samples])
            )
        tokens: list[SampledToken] = []
        for place, spec in enumerate(item.samples):
            known = end - item.num_drafts + place
            tokens.append(SampledToken(draw(self._all_kv(item, known), spec.seed, spec.choice, spec.position)))
            if place < item.num_drafts and tokens[-1].token_id != item.token_ids[known - item.start]:
                break
        return SliceResult(tuple(tokens))

    def _all_kv(self, item: SequenceSlice, end: int) -> bytes:
        return self._cut.all_kv(self._memory.bytes, item.block_table, end)

    def _copy(self, source: int, destination: int) -> None:
        content, size = self._memory.bytes, self._memory.block_bytes
        self._memory.check_engine_use((source, destination))
        self._memory.check_engine_write(destination)
        content[destination * size : (destination + 1) * size] = content[source * size : (source + 1) * size]
