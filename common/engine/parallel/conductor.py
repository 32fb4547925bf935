"""Rank 0's word to the other ranks: what is computed, copied and swapped, in one order for all; and what comes back.

    conductor  -- orders (`messages`) -->  every other rank, which carries them out one after the other
               <-- layers, logits, ends --

Whole steps are computed by `compute`, on the thread that calls it, and every rank cuts them alike. Where steps follow each other
without a gap (`line`), rank 0 cuts them, and each part is an order of its own: `enter` and `leave` are called by two threads,
each in the order of the parts. Nothing else is called while a part is under way. It knows neither processes nor what a step is
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch

from common.config import ParallelConfig
from common.engine.batch import ScheduledBatch
from common.engine.models import LayerDone
from common.engine.parallel.line import Line
from common.engine.parallel.links import Link
from common.engine.parallel.messages import encode_copy, encode_move, encode_step, encode_swap
from common.engine.parallel.share import Share
from common.engine.parallel.stage import StageShare
from common.engine.parallel.sums import as_bytes
from common.errors import PdserveError


class Conductor:
    """A `StepGroup`, and what `GroupSwapRegion` moves blocks with."""

    def __init__(
        self,
        parallel: ParallelConfig,
        mine: StageShare,
        controls: Mapping[int, Link],
        shares: Sequence[Share],
        on_error: Callable[[PdserveError], None],
    ) -> None:
        """`controls` are the links to the other ranks; `on_error` is told what kept an order from being carried out."""
        stages = parallel.pipeline_parallel
        self.line = Line(self, stages, parallel.micro_batch_tokens, mine.pool.device) if stages > 1 else None
        self._mine = mine
        self._controls = tuple(controls[rank] for rank in sorted(controls))
        self._on_error = on_error
        self._results = tuple((share, controls[share.rank]) for share in shares if share.is_last and share.rank)
        self._later_layers = tuple(  # those of later stages, and who tells of them
            (layer, controls[share.rank]) for share in shares if share.shard == 0 and not share.is_first for layer in share.layers
        )
        self._vocab_size = max(share.vocab.stop for share in shares)

    def compute(
        self,
        batch: ScheduledBatch,
        wanted: Sequence[Sequence[int]],
        kept: Sequence[int] = (),
        layer_done: LayerDone | None = None,
    ) -> Iterator[torch.Tensor]:
        """Computes a step on all ranks; when it returns all keys and values are in the pool. The logits of each group of rows in
        `wanted`, fp32 [rows, vocab], and behind them the hidden rows `kept`, which are some of those, are to be taken one after
        the other, all of them, before the next step. `layer_done` is called meanwhile, on this thread, layer after layer."""
        with self._reporting():
            self._tell(encode_step(batch, wanted, kept, watched=layer_done is not None))
            hidden = self._mine.compute(batch, layer_done)
            return self._take(hidden, wanted, kept, layer_done, ends_step=True)

    def enter(
        self,
        part: ScheduledBatch,
        wanted: Sequence[Sequence[int]],
        kept: Sequence[int],
        *,
        ends_step: bool,
        layer_done: LayerDone | None,
    ) -> None:
        """Orders a part of a step, and computes this rank's share of it. What comes of it `leave` takes, with the same words.
        `layer_done` is called for the layers of the first stage, by this thread, and for the others by that of `leave`; it is
        given with the part that `ends_step`."""
        with self._reporting():
            self._tell(encode_step(part, wanted, kept, watched=layer_done is not None, is_part=True, ends_step=ends_step))
            self._mine.compute_part(part, layer_done)

    def leave(
        self, wanted: Sequence[Sequence[int]], kept: Sequence[int], *, ends_step: bool, layer_done: LayerDone | None
    ) -> Iterator[torch.Tensor]:
        """Of the earliest part that entered and has not left: as `compute`. Without `wanted`, and if it does not end its step,
        nothing is waited for."""
        with self._reporting():
            return self._take(None, wanted, kept, layer_done, ends_step=ends_step)

    def copy_block(self, source: int, destination: int) -> None:
        with self._reporting():
            self._tell(encode_copy(source, destination))
        self._mine.copy_block(source, destination)

    def make_swap_region(self, num_slots: int) -> None:
        """Of so many slots on each rank, in place of the one before; 0 = none."""
        with self._reporting():
            self._tell(encode_swap(num_slots))
        self._mine.make_swap_region(num_slots)

    def move(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> None:
        """As `SwapSpace.move`, on all ranks: when it returns, every one of them has done it."""
        with self._reporting():
            self._tell(encode_move(brought_in, put_out))
        self._mine.move(brought_in, put_out)
        with self._reporting():
            for control in self._controls:
                _wait_for_word(control)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except PdserveError as error:
            self._on_error(error)
            raise

    def _tell(self, message: bytes) -> None:
        for control in self._controls:
            control.send(message)

    def _take(
        self,
        hidden: torch.Tensor | None,
        wanted: Sequence[Sequence[int]],
        kept: Sequence[int],
        layer_done: LayerDone | None,
        *,
        ends_step: bool,
    ) -> Iterator[torch.Tensor]:
        """`hidden` are the rows of the last stage, if this rank is in it."""
        if layer_done is not None:
            for layer, control in self._later_layers:
                _wait_for_word(control)
                layer_done(layer + 1)
        if wanted:
            rest = (self._logits(hidden, rows) for rows in wanted[1:])
            rows = (self._rows(hidden, rows) for rows in (kept,) if rows)
            return chain((self._logits(hidden, wanted[0]),), rest, rows)
        if ends_step:
            for _, control in self._results:
                _wait_for_word(control)
            self._mine.settle()
        return iter(())

    def _logits(self, hidden: torch.Tensor | None, rows: Sequence[int]) -> torch.Tensor:
        logits = torch.empty(len(rows), self._vocab_size)
        if hidden is not None:
            mine = self._mine
            logits[:, mine.share.vocab.start : mine.share.vocab.stop] = mine.logits(hidden, rows)
        for share, control in self._results:
            part = torch.empty(len(rows), len(share.vocab))
            control.receive_into(as_bytes(part))
            logits[:, share.vocab.start : share.vocab.stop] = part
        return logits.to(self._mine.pool.device)

    def _rows(self, hidden: torch.Tensor | None, kept: Sequence[int]) -> torch.Tensor:
        if hidden is not None:
            return self._mine.rows(hidden, kept)
        control = next(control for share, control in self._results if share.shard == 0)
        rows = self._mine.no_rows(len(kept))
        control.receive_into(as_bytes(rows))
        return rows.to(self._mine.pool.device)


def _wait_for_word(control: Link) -> None:
    """Of one who says no more than that something is done."""
    control.receive_into(memoryview(bytearray()))
