"""Guesses by a small model of the same vocabulary, with KV of its own.

    known tokens   |== in the draft's KV ==|-- caught up with --|
    guess                                                       g1 -> g2 -> g3        one step of the small model for each

All sequences are drafted for together, one token of each per step. A guess is drawn as the answer will be: with the request's
temperature and filters, and with the very random number of its position, so that two models that agree also draw alike. Penalties
and bans are left out; they are the verifier's.

A prompt is caught up with in pieces, so that nobody waits for long; until then there is no guess. Where blocks run out, the
sequences that nobody asked about for longest lose theirs. What the small model computed for guesses that came true is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from common.engine.batch import ForwardResult, SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.block_manager import BlockManager
from common.engine.sequence import PagedSequence
from decode_worker.speculation.proposer import ChoiceKey, Guess, Wanted

_CATCH_UP_ROWS = 512  # of known tokens, per call


class Runner(Protocol):
    """Computes steps of the small model."""

    def execute(self, batch: ScheduledBatch) -> ForwardResult: ...


class _Draft:
    """What the small model knows of one sequence."""

    def __init__(self, sequence: PagedSequence) -> None:
        self.sequence = sequence
        self.guess: list[int] = []  # all but the last token of it are in KV, behind the sequence


class DraftModelProposer:
    name = "draft"
    takes_time = True
    reads_rows = False

    def __init__(self, runner: Runner, blocks: BlockManager, max_model_tokens: int) -> None:
        self._runner = runner
        self._blocks = blocks
        self._max_model_tokens = max_model_tokens
        self._drafts: OrderedDict[ChoiceKey, _Draft] = OrderedDict()  # who was asked about least recently comes first

    @property
    def num_sequences(self) -> int:
        return len(self._drafts)

    def propose(self, wanted: Sequence[Wanted]) -> list[Guess]:
        drafts = [self._known(item) for item in wanted]
        guesses: list[list[int]] = [[] for _ in wanted]
        ready = self._catch_up(wanted, drafts, guesses)
        while ready := [place for place in ready if len(guesses[place]) < wanted[place].most_tokens]:
            slices = []
            for place in ready:
                sequence, guess = drafts[place].sequence, guesses[place]
                start = len(sequence.tokens) + len(guess) - 1
                spec = _sample(wanted[place], start + 1)
                slices.append(SequenceSlice([guess[-1]], start, sequence.blocks, (spec,)))
            result = self._runner.execute(ScheduledBatch(tuple(slices)))
            for place, computed in zip(ready, result.slices, strict=True):
                guesses[place].append(computed.tokens[0].token_id)
        for draft, guess in zip(drafts, guesses, strict=True):
            draft.guess = guess
        return [Guess(tuple(guess)) for guess in guesses]

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        draft = self._drafts.pop(key, None)
        if draft is not None:
            self._blocks.release(draft.sequence.detach())

    def _known(self, wanted: Wanted) -> _Draft:
        """The sequence as it is now, with what is in KV of it."""
        draft = self._drafts.get(wanted.key)
        if draft is None:
            draft = _Draft(PagedSequence((), self._blocks.root(wanted.salt), self._blocks.block_tokens))
            self._drafts[wanted.key] = draft
        self._drafts.move_to_end(wanted.key)
        sequence = draft.sequence
        came = wanted.tokens[len(sequence.tokens) :]
        kept = 0  # never all that came: the last token is computed again, for what follows it
        while kept < min(len(came), len(draft.guess)) - 1 and came[kept] == draft.guess[kept]:
            kept += 1
        sequence.tokens.extend(came)
        sequence.advance(kept, self._blocks)
        draft.guess = []
        if not sequence.blocks:
            cached = self._blocks.match_prefix(sequence.tokens, wanted.salt, max_tokens=len(sequence.tokens) - 1)
            self._blocks.acquire(cached)
            sequence.attach(cached, 0)
            sequence.advance(len(cached) * self._blocks.block_tokens, self._blocks)
        return draft

    def _catch_up(self, wanted: Sequence[Wanted], drafts: Sequence[_Draft], guesses: list[list[int]]) -> list[int]:
        """Computes known tokens, as many as one call may. Returns the places whose first token was guessed with it."""
        keep = {item.key for item in wanted}
        slices: list[SequenceSlice] = []
        shares: list[tuple[int, int]] = []
        rows_left = _CATCH_UP_ROWS
        for place, (item, draft) in enumerate(zip(wanted, drafts, strict=True)):
            sequence = draft.sequence
            num_tokens = len(sequence.tokens)
            count = min(sequence.remaining, rows_left)
            if not count or not item.most_tokens or num_tokens + item.most_tokens > self._max_model_tokens:
                continue
            if not self._make_room(sequence, num_tokens + item.most_tokens, keep):
                continue
            whole = count == sequence.remaining
            slices.append(sequence.slice(count, (_sample(item, num_tokens),) if whole else ()))
            shares.append((place, count))
            rows_left -= count
        if not slices:
            return []
        ready: list[int] = []
        for (place, count), computed in zip(shares, self._runner.execute(ScheduledBatch(tuple(slices))).slices, strict=True):
            drafts[place].sequence.advance(count, self._blocks)
            if computed.tokens:
                guesses[place].append(computed.tokens[0].token_id)
                ready.append(place)
        return ready

    def _make_room(self, sequence: PagedSequence, num_tokens: int, keep: set[ChoiceKey]) -> bool:
        missing = sequence.missing_blocks(num_tokens)
        while not self._blocks.can_allocate(missing):
            victim = next((key for key, draft in self._drafts.items() if key not in keep and draft.sequence.blocks), None)
            if victim is None:
                return False
            self._drafts[victim].guess = []
            self._blocks.release(self._drafts[victim].sequence.detach())
        sequence.blocks.extend(self._blocks.allocate(missing))
        return True


def _sample(wanted: Wanted, position: int) -> SampleSpec:
    sampling = wanted.sampling
    return SampleSpec(
        position=position,
        seed=sampling.seed,
        choice=wanted.key.choice,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        logprobs=None,
    )
