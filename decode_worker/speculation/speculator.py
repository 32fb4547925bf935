"""Guesses for a step, and what became of them: a proposer, and the controller that says how much of a guess pays.

    step:   draft (all decoding sequences) -> ... computed ... -> settle (each of them), observe_step
    choice: first draft -> ... -> end

`Speculator` is what the scheduler asks. Where guesses cost next to nothing, all are made and the best are taken; a sequence whose
guesses come to nothing is left alone for some steps when many others decode. Where each token of a guess takes a step of a model,
it is first decided how long guesses are to be, from what earlier ones were worth and from how long they took, reading of prompts
included; if they do not pay, a short one is made from time to time, ever more rarely, to see whether they do now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from common.clock import Clock
from decode_worker.speculation.acceptance import Acceptance, History, Promises
from decode_worker.speculation.controller import choose_lengths
from decode_worker.speculation.proposer import ChoiceKey, Guess, Proposer, Wanted
from decode_worker.speculation.step_cost import StepCost

_SEQUENCES_PER_STEP_OF_REST = 4
_LONGEST_REST_STEPS = 16
_STEPS_TO_TRIAL, _MOST_STEPS_TO_TRIAL = 64, 8192
_TRIAL_TOKENS = 2
_MEMORY = 32  # calls of a proposer


class Speculator(Protocol):
    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        """Drafts for each, perhaps empty; the step has `num_rows` rows without them. The scheduler cuts off what does not fit."""
        ...

    def settle(self, key: ChoiceKey, came: Sequence[int]) -> None:
        """The tokens that the step gave to a choice which `draft` was asked about."""
        ...

    def observe_step(self, num_rows: int, seconds: float) -> None: ...

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """The choice is over, whether or not it was ever asked about."""
        ...


class _Sequence:
    __slots__ = ("guess", "history", "misses", "promised", "rest_steps", "taken")

    def __init__(self) -> None:
        self.history = History()
        self.guess = Guess()
        self.taken, self.promised = 0, 0.0  # how much of the guess is in the step, and how many right tokens that promises
        self.misses = 0  # in a row
        self.rest_steps = 0


class AdaptiveSpeculator:
    def __init__(self, proposer: Proposer, max_draft_tokens: int, clock: Clock) -> None:
        self._proposer = proposer
        self._clock = clock
        self._calls: deque[tuple[float, int]] = deque(maxlen=_MEMORY)  # of a proposer that makes steps: seconds, tokens
        self._idle_steps = 0
        self._next_trial_steps = _STEPS_TO_TRIAL
        self._max_draft_tokens = max_draft_tokens
        self._acceptance = Acceptance()
        self._promises = Promises()
        self._cost = StepCost()
        self._sequences: dict[ChoiceKey, _Sequence] = {}

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def draft(self, wanted: Sequence[Wanted], *, num_rows: int, most_rows: int) -> list[Sequence[int]]:
        if most_rows <= 0:
            return [()] * len(wanted)
        if self._proposer.makes_steps:
            return self._draft_by_steps(wanted, num_rows, most_rows)
        asked = [place for place, item in enumerate(wanted) if self._is_awake(item.key, len(wanted))]
        limited = [
            replace(item, most_tokens=min(item.most_tokens, self._max_draft_tokens))
            for item in (wanted[place] for place in asked)
        ]
        offers: list[tuple[int, float, float]] = []
        for item, guess in zip(limited, self._proposer.propose(limited), strict=True):
            sequence = self._sequences[item.key]
            sequence.guess = guess
            offers.append((len(guess.token_ids), *self._rates(sequence, guess.evidence)))
        lengths = choose_lengths(offers, self._cost, num_sequences=len(wanted), num_rows=num_rows, most_rows=most_rows)
        drafts: list[Sequence[int]] = [()] * len(wanted)
        kept_share = self._promises.kept_share
        for place, item, length, offer in zip(asked, limited, lengths, offers, strict=True):
            sequence = self._sequences[item.key]
            sequence.taken, sequence.promised = length, _expected(length, offer) / kept_share
            drafts[place] = sequence.guess.token_ids[:length]
        return drafts

    def settle(self, key: ChoiceKey, came: Sequence[int]) -> None:
        sequence = self._sequences.get(key)
        if sequence is None or sequence.rest_steps:
            return
        guess, sequence.guess = sequence.guess, Guess()
        if sequence.taken:
            self._promises.observe(sequence.promised, max(0, min(len(came) - 1, sequence.taken)))
            sequence.taken = 0
        self._acceptance.observe(sequence.history, guess.evidence, guess.token_ids, came)
        is_right = bool(guess.token_ids and came) and guess.token_ids[0] == came[0]
        sequence.misses = 0 if is_right else sequence.misses + 1

    def observe_step(self, num_rows: int, seconds: float) -> None:
        self._cost.observe(num_rows, seconds)
        self._promises.step()

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        self._sequences.pop(key, None)
        self._proposer.end(key, salt, tokens, num_prompt_tokens)

    def _draft_by_steps(self, wanted: Sequence[Wanted], num_rows: int, most_rows: int) -> list[Sequence[int]]:
        sequences = [self._sequences.setdefault(item.key, _Sequence()) for item in wanted]
        offers = [
            (min(item.most_tokens, self._max_draft_tokens), *self._rates(sequence, 0))
            for item, sequence in zip(wanted, sequences, strict=True)
        ]
        drafting_s = self._seconds_per_token()
        lengths = choose_lengths(
            offers, self._cost, num_sequences=len(wanted), num_rows=num_rows, most_rows=most_rows, drafting_s=drafting_s
        )
        if not any(lengths):
            self._idle_steps += 1
            if self._idle_steps < self._next_trial_steps:
                return [()] * len(wanted)
            self._next_trial_steps = min(2 * self._next_trial_steps, _MOST_STEPS_TO_TRIAL)
            lengths = [min(_TRIAL_TOKENS, length, most_rows // len(wanted)) for length, _, _ in offers]
        else:
            self._next_trial_steps = _STEPS_TO_TRIAL
        self._idle_steps = 0
        started_s = self._clock.monotonic_s()
        guesses = self._proposer.propose(
            [replace(item, most_tokens=length) for item, length in zip(wanted, lengths, strict=True)]
        )
        self._calls.append((self._clock.monotonic_s() - started_s, max(len(guess.token_ids) for guess in guesses)))
        for sequence, guess, offer in zip(sequences, guesses, offers, strict=True):
            sequence.guess = guess
            sequence.taken = len(guess.token_ids)
            sequence.promised = _expected(sequence.taken, offer) / self._promises.kept_share
        return [guess.token_ids for guess in guesses]

    def _rates(self, sequence: _Sequence, evidence: int) -> tuple[float, float]:
        first, further = self._acceptance.rates(sequence.history, evidence)
        return first * self._promises.kept_share, further

    def _seconds_per_token(self) -> float:
        """Of guesses in all sequences at once. Nothing before it was tried."""
        return sum(seconds for seconds, _ in self._calls) / max(1, sum(tokens for _, tokens in self._calls))

    def _is_awake(self, key: ChoiceKey, num_sequences: int) -> bool:
        sequence = self._sequences.get(key)
        if sequence is None:
            sequence = self._sequences[key] = _Sequence()
        longest = min(_LONGEST_REST_STEPS, num_sequences // _SEQUENCES_PER_STEP_OF_REST)
        if sequence.rest_steps < min(longest, sequence.misses):
            sequence.rest_steps += 1
            return False
        sequence.rest_steps = 0
        return True


def _expected(length: int, offer: tuple[int, float, float]) -> float:
    """Right tokens among the first `length` of a guess."""
    _, first, further = offer
    return sum(first * further**place for place in range(length))
