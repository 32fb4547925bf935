"""Guesses for a step, and what became of them: proposers, and the controller that says whose guess pays and how much of it.

    step:   draft (all decoding sequences) -> ... computed ... -> settle (each of them), observe_step
    choice: remember, or first draft -> ... -> end

`Speculator` is what the scheduler asks. A proposer whose guesses cost next to nothing is always asked; but a sequence that it has
nothing right for is left alone for some steps when many others decode, and nobody is asked for a while if all the asking came to
a loss (`recess`). Guesses that take time are made after that, for sequences where one promises more than what is there: if the
answers come faster by them, what they are to be worth and the time that they take included, which earlier ones have shown. If
they do not pay, a short one is made from time to time, ever more rarely, to see whether they do now. When all guesses are there,
the best of them are taken.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.clock import Clock
from decode_worker.speculation.acceptance import Acceptance, History, Promises
from decode_worker.speculation.controller import best_lengths
from decode_worker.speculation.payoff import Payoff
from decode_worker.speculation.proposer import ChoiceKey, Guess, Proposer, Wanted
from decode_worker.speculation.recess import Recess
from decode_worker.speculation.step_cost import StepCost

if TYPE_CHECKING:
    from common.engine.heads.rows import HiddenRow

_SEQUENCES_PER_STEP_OF_REST = 2  # asking eight chats in vain takes more than a hundredth of their step
_LONGEST_REST_STEPS = 16
_STEPS_TO_TRIAL, _MOST_STEPS_TO_TRIAL = 64, 8192
_TRIAL_TOKENS = 2
_MEMORY = 32  # calls of a proposer
_ANY = -1  # the evidence of a guess that is yet to be made


class Speculator(Protocol):
    @property
    def keeps_rows(self) -> bool:
        """Whether it wants the hidden rows that tokens were drawn from."""
        ...

    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        """Drafts for each, perhaps empty; the step has `num_rows` rows without them. The scheduler cuts off what does not fit."""
        ...

    def author(self, key: ChoiceKey) -> str:
        """Who made the last draft of a choice: the name of a proposer."""
        ...

    def remember(self, key: ChoiceKey, row: HiddenRow) -> None:
        """A token of the choice that `draft` was not asked about was drawn from this row: its first, here or elsewhere, or one of
        a step that was planned ahead."""
        ...

    def settle(self, key: ChoiceKey, came: Sequence[int], row: HiddenRow | None = None) -> None:
        """The tokens that the step gave to a choice which `draft` was asked about, and what the last of them was drawn from."""
        ...

    def observe_step(self, num_rows: int, seconds: float) -> None: ...

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """The choice is over, whether or not it was ever asked about."""
        ...


_NO_GUESS = Guess()


@dataclass(frozen=True, slots=True)
class _Offer:
    """A guess that is there, or, without one, what a proposer could make."""

    proposer: str = ""
    guess: Guess = _NO_GUESS
    length: int = 0
    first: float = 0.0
    further: float = 0.0

    @property
    def figures(self) -> tuple[int, float, float]:
        return self.length, self.first, self.further

    @property
    def worth(self) -> float:
        return _expected(self.length, self.first, self.further)


_NOTHING = _Offer()


class _Sequence:
    __slots__ = ("guesses", "history", "is_resting", "misses", "promised", "rest_steps", "row", "taken", "taken_of")

    def __init__(self) -> None:
        self.history = History()
        self.row: HiddenRow | None = None
        self.guesses: dict[str, Guess] = {}  # of this step, by proposer
        self.taken, self.taken_of = 0, ""  # how much of whose guess is in the step,
        self.promised = 0.0  # and how many right tokens that promises
        self.misses = 0  # of the quick proposer, in a row
        self.rest_steps = 0
        self.is_resting = False


class AdaptiveSpeculator:
    def __init__(self, proposers: Sequence[Proposer], max_draft_tokens: int, clock: Clock) -> None:
        """At most one that takes time, and at most one that does not."""
        self._quick = next((proposer for proposer in proposers if not proposer.takes_time), None)
        self._slow = next((proposer for proposer in proposers if proposer.takes_time), None)
        self._clock = clock
        self._calls: deque[tuple[float, int]] = deque(maxlen=_MEMORY)  # of the one that takes time: seconds, tokens
        self._idle_steps = 0
        self._next_trial_steps = _STEPS_TO_TRIAL
        self._max_draft_tokens = max_draft_tokens
        self._acceptance = Acceptance()
        self._promises: defaultdict[str, Promises] = defaultdict(Promises)
        self._cost = StepCost()
        self._payoff = Payoff()
        self._recess = Recess()
        self._is_asking = True  # about the step at hand
        self._sequences: dict[ChoiceKey, _Sequence] = {}

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def keeps_rows(self) -> bool:
        return any(proposer.reads_rows for proposer in (self._quick, self._slow) if proposer is not None)

    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        gained = self._payoff.close()
        if gained is not None:
            self._recess.gained(gained)
        if most_rows <= 0:
            return [()] * len(wanted)
        asked_s = self._clock.monotonic_s()
        sequences = [self._sequence(item.key) for item in wanted]
        self._is_asking = not self._recess.is_on(len(wanted))
        if not self._is_asking:
            return [()] * len(wanted)
        offers = [_NOTHING] * len(wanted)
        if self._quick is not None:
            self._ask_quick(self._quick, wanted, sequences, offers)
        lengths, gain = [0] * len(wanted), 0.0
        if any([offer.length for offer in offers]):
            lengths, gain = best_lengths(
                [offer.figures for offer in offers],
                self._cost,
                num_sequences=len(wanted),
                num_rows=num_rows,
                most_rows=most_rows,
                demanded=self._payoff.demanded,
            )
        if self._slow is not None:
            lengths = self._ask_slow(self._slow, wanted, sequences, offers, lengths, gain, num_rows, most_rows)
        drafts: list[Sequence[int]] = []
        for sequence, offer, length in zip(sequences, offers, lengths, strict=True):
            sequence.taken, sequence.taken_of = length, offer.proposer
            if not length:
                drafts.append(())
                continue
            kept_share = self._promises[offer.proposer].kept_share
            sequence.promised = _expected(length, offer.first, offer.further) / kept_share
            drafts.append(offer.guess.token_ids[:length])
        without_s = self._cost.of(num_rows, 1)[0] if self._cost.is_known else 0.0
        asking_s = self._clock.monotonic_s() - asked_s
        if any(drafts):
            self._payoff.planned(num_sequences=len(wanted), without_s=without_s, asking_s=asking_s)
        elif without_s > 0.0:
            self._recess.gained(-math.log1p(asking_s / without_s))
        return drafts

    def author(self, key: ChoiceKey) -> str:
        sequence = self._sequences.get(key)
        return "" if sequence is None else sequence.taken_of

    def remember(self, key: ChoiceKey, row: HiddenRow) -> None:
        if self.keeps_rows:
            self._sequence(key).row = row

    def settle(self, key: ChoiceKey, came: Sequence[int], row: HiddenRow | None = None) -> None:
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        sequence.row = row
        if sequence.taken:
            num_right = max(0, min(len(came) - 1, sequence.taken))
            self._promises[sequence.taken_of].observe(sequence.promised, num_right)
            self._payoff.right(num_right)
            sequence.taken = 0
        guesses, sequence.guesses = sequence.guesses, {}
        for name, guess in guesses.items():
            self._acceptance.observe(sequence.history, (name, guess.evidence), guess.token_ids, came)
            if self._slow is not None and name == self._slow.name:
                self._acceptance.observe(sequence.history, (name, _ANY), guess.token_ids, came)
        if self._quick is not None and self._is_asking and not sequence.is_resting:
            guess = guesses.get(self._quick.name, _NO_GUESS)
            is_right = bool(guess.token_ids and came) and guess.token_ids[0] == came[0]
            sequence.misses = 0 if is_right else sequence.misses + 1

    def observe_step(self, num_rows: int, seconds: float) -> None:
        self._cost.observe(num_rows, seconds)
        self._payoff.took(seconds)
        for promises in self._promises.values():
            promises.step()

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        self._sequences.pop(key, None)
        for proposer in (self._quick, self._slow):
            if proposer is not None:
                proposer.end(key, salt, tokens, num_prompt_tokens)

    def _sequence(self, key: ChoiceKey) -> _Sequence:
        sequence = self._sequences.get(key)
        if sequence is None:
            sequence = self._sequences[key] = _Sequence()
        return sequence

    def _ask_quick(
        self, proposer: Proposer, wanted: Sequence[Wanted], sequences: Sequence[_Sequence], offers: list[_Offer]
    ) -> None:
        """Puts its guesses into `offers`."""
        asked = [place for place, sequence in enumerate(sequences) if _is_awake(sequence, len(sequences))]
        most = self._max_draft_tokens
        items = [item if item.most_tokens <= most else item._replace(most_tokens=most) for item in map(wanted.__getitem__, asked)]
        for place, guess in zip(asked, proposer.propose(items), strict=True):
            offers[place] = self._made(proposer.name, sequences[place], guess)

    def _ask_slow(
        self,
        proposer: Proposer,
        wanted: Sequence[Wanted],
        sequences: Sequence[_Sequence],
        offers: list[_Offer],
        lengths: list[int],
        gain: float,
        num_rows: int,
        most_rows: int,
    ) -> list[int]:
        """Has guesses made where that makes answers come faster than `lengths` of `offers`, which gain `gain`; puts them into
        `offers`. How much to take of each."""
        possible = [
            _Offer(
                proposer.name,
                _NO_GUESS,
                min(item.most_tokens, self._max_draft_tokens),
                *self._rates(proposer.name, sequence, _ANY),
            )
            if sequence.row is not None or not proposer.reads_rows
            else _NOTHING
            for item, sequence in zip(wanted, sequences, strict=True)
        ]
        awaited = {place for place, (made, other) in enumerate(zip(offers, possible, strict=True)) if other.worth > made.worth}
        mixed = [(possible if place in awaited else offers)[place].figures for place in range(len(offers))]
        planned, planned_gain = best_lengths(
            mixed,
            self._cost,
            num_sequences=len(wanted),
            num_rows=num_rows,
            most_rows=most_rows,
            awaited=awaited,
            drafting_s=self._seconds_per_token(),
            demanded=self._payoff.demanded,
        )
        if planned_gain > gain and any(planned[place] for place in awaited):
            self._idle_steps, self._next_trial_steps = 0, _STEPS_TO_TRIAL
            self._make(proposer, wanted, sequences, offers, {place: planned[place] for place in awaited if planned[place]})
            figures = [offer.figures for offer in offers]
            return best_lengths(figures, self._cost, num_sequences=len(wanted), num_rows=num_rows, most_rows=most_rows)[0]
        self._idle_steps += 1
        to_try = [place for place in awaited if not lengths[place]]
        if self._idle_steps < self._next_trial_steps or not to_try:
            return lengths
        self._idle_steps, self._next_trial_steps = 0, min(2 * self._next_trial_steps, _MOST_STEPS_TO_TRIAL)
        most = min(_TRIAL_TOKENS, (most_rows - sum(lengths)) // len(to_try))
        self._make(proposer, wanted, sequences, offers, {place: min(most, possible[place].length) for place in to_try})
        return [
            len(offer.guess.token_ids) if offer.proposer == proposer.name else length
            for place, (offer, length) in enumerate(zip(offers, lengths, strict=True))
        ]

    def _make(
        self,
        proposer: Proposer,
        wanted: Sequence[Wanted],
        sequences: Sequence[_Sequence],
        offers: list[_Offer],
        to_make: dict[int, int],
    ) -> None:
        """Guesses of so many tokens for these places, into `offers`."""
        asked = [place for place, length in to_make.items() if length]
        if not asked:
            return
        items = [wanted[place]._replace(most_tokens=to_make[place], row=sequences[place].row) for place in asked]
        started_s = self._clock.monotonic_s()
        guesses = proposer.propose(items)
        self._calls.append((self._clock.monotonic_s() - started_s, max(len(guess.token_ids) for guess in guesses)))
        for place, guess in zip(asked, guesses, strict=True):
            offers[place] = self._made(proposer.name, sequences[place], guess)

    def _made(self, name: str, sequence: _Sequence, guess: Guess) -> _Offer:
        sequence.guesses[name] = guess
        if not guess.token_ids:
            return _NOTHING
        return _Offer(name, guess, len(guess.token_ids), *self._rates(name, sequence, guess.evidence))

    def _rates(self, name: str, sequence: _Sequence, evidence: int) -> tuple[float, float]:
        first, further = self._acceptance.rates(sequence.history, (name, evidence))
        return first * self._promises[name].kept_share, further

    def _seconds_per_token(self) -> float:
        """Of guesses in all sequences at once. Nothing before it was tried."""
        return sum(seconds for seconds, _ in self._calls) / max(1, sum(tokens for _, tokens in self._calls))


def _is_awake(sequence: _Sequence, num_sequences: int) -> bool:
    longest = min(_LONGEST_REST_STEPS, num_sequences // _SEQUENCES_PER_STEP_OF_REST)
    sequence.is_resting = sequence.rest_steps < min(longest, sequence.misses)
    sequence.rest_steps = sequence.rest_steps + 1 if sequence.is_resting else 0
    return not sequence.is_resting


def _expected(length: int, first: float, further: float) -> float:
    """Right tokens among the first `length` of a guess."""
    return sum(first * further**place for place in range(length))
