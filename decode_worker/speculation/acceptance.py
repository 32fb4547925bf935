"""How often guesses are right: the first token of a guess, and each further one after a right one.

Both are counted per class of evidence, over all sequences, and per sequence and class; a sequence counts for more the more it
has shown. What is old fades: counts are halved when they are full. Every guess is counted by what came, used or not, so nothing
has to be risked to learn that guesses have become better.

Of many guesses the best are taken, and the best are those that were overrated. `Promises` holds what was taken against what came
of it, so that the choice can be made with what such guesses turn out to be worth.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

_PRIOR = 0.4  # of a class nobody has seen, worth
_PRIOR_TRIALS = 2.0
_CLASS_TRIALS = 4.0  # what the class is worth against the sequence's own trials
_MOST_TRIALS = 24.0  # of a sequence
_MOST_CLASS_TRIALS = 256.0
_CERTAIN = 0.98
_PROMISE_PRIOR = 8.0  # tokens
_STEPS_TO_FADE = 256


class _Counts:
    __slots__ = ("right", "trials")

    def __init__(self) -> None:
        self.trials = self.right = 0.0

    def add(self, trials: int, right: int, most: float) -> None:
        self.trials += trials
        self.right += right
        if self.trials > most:
            self.trials /= 2
            self.right /= 2

    def rate(self, expected: float, weight: float) -> float:
        return (self.right + weight * expected) / (self.trials + weight)


class _Record:
    """One class of evidence."""

    __slots__ = ("first", "further")

    def __init__(self) -> None:
        self.first, self.further = _Counts(), _Counts()


class History:
    """Of one sequence, or of all."""

    def __init__(self) -> None:
        self.records: dict[Hashable, _Record] = {}

    def record(self, evidence: Hashable) -> _Record:
        record = self.records.get(evidence)
        if record is None:
            record = self.records[evidence] = _Record()
        return record


class Promises:
    """Tokens that the guesses of steps were expected to give, and those that they gave. Fades, so that a bad stretch is not held
    against guesses that nobody takes any more."""

    def __init__(self) -> None:
        self._promised = self._kept = 0.0
        self._steps = 0

    @property
    def kept_share(self) -> float:
        """At most 1: guesses that were underrated are found out by their own counts. At least a half: those that are
        never right as well, and they have to be taken again when they have become better."""
        return max(0.5, min(1.0, (self._kept + _PROMISE_PRIOR) / (self._promised + _PROMISE_PRIOR)))

    def observe(self, promised: float, kept: int) -> None:
        self._promised += promised
        self._kept += kept

    def step(self) -> None:
        self._steps += 1
        if self._steps % _STEPS_TO_FADE == 0:
            self._promised /= 2
            self._kept /= 2


class Acceptance:
    def __init__(self) -> None:
        self._all = History()

    def observe(self, history: History, evidence: Hashable, guess: Sequence[int], came: Sequence[int]) -> None:
        """A guess, and the tokens that came in its place; only as far as both go."""
        compared = min(len(guess), len(came))
        if not compared:
            return
        right = next((place for place in range(compared) if guess[place] != came[place]), compared)
        first, trials = int(right > 0), min(right, compared - 1)  # a further token is tried after a right one
        for record, most in ((history.record(evidence), _MOST_TRIALS), (self._all.record(evidence), _MOST_CLASS_TRIALS)):
            record.first.add(1, first, most)
            if trials:
                record.further.add(trials, right - 1, most)

    def rates(self, history: History, evidence: Hashable) -> tuple[float, float]:
        """The probability that the first token of such a guess is right, and that of each further one after a right one."""
        everybody, own = self._all.record(evidence), history.record(evidence)
        first = own.first.rate(everybody.first.rate(_PRIOR, _PRIOR_TRIALS), _CLASS_TRIALS)
        further = own.further.rate(everybody.further.rate(_PRIOR, _PRIOR_TRIALS), _CLASS_TRIALS)
        return min(first, _CERTAIN), min(further, _CERTAIN)
