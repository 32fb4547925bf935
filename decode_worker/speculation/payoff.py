"""What steps with guesses came to, against the same steps without: what falls short raises what is demanded of the next ones.

    planned(rows without guesses, sequences, expected seconds without, seconds of asking) -> took(seconds) -> right(tokens) ...
                     -> closed, with the next step: gained = mean of log(tokens of an answer) - log(time / time without)

What a guess promises rests on medians and on rates of many guesses. Where these are wrong together (a machine whose steps are
now and then much longer, texts that change), every promise may be kept by its own count, and guessing a loss all the same. So the
loss itself is looked at: it adds to a bar that promises have to clear, gains take from it, and while nothing is guessed the bar
comes down by itself, so that it is found out when guesses pay again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_RATE = 0.1  # of a gain or loss that goes into the bar
_MOST_GAINED = 0.5  # of one step; beyond, something else happened
_HIGHEST = 1.0
_KEPT_WITHOUT_GUESSES = 0.99  # per step


@dataclass(slots=True)
class _Step:
    num_sequences: int
    without_s: float
    asking_s: float
    seconds: float = 0.0
    log_tokens: float = 0.0


class Payoff:
    def __init__(self) -> None:
        self._bar = 0.0
        self._step: _Step | None = None

    @property
    def demanded(self) -> float:
        """To be added to the logarithm of the gain from which on guesses are taken."""
        return self._bar

    def planned(self, *, num_sequences: int, without_s: float, asking_s: float) -> None:
        """A step with guesses."""
        self._step = _Step(num_sequences, without_s, asking_s)

    def took(self, seconds: float) -> None:
        """The step that was planned, or one without guesses."""
        if self._step is not None:
            self._step.seconds = seconds
        else:
            self._bar *= _KEPT_WITHOUT_GUESSES

    def right(self, num_tokens: int) -> None:
        """So many guesses of one sequence were right."""
        if self._step is not None:
            self._step.log_tokens += math.log1p(num_tokens)

    def close(self) -> float | None:
        """Before the next step is planned: what the one with guesses gained, if that can be told."""
        step, self._step = self._step, None
        if step is None or step.seconds <= 0.0 or step.without_s <= 0.0:
            return None
        slower = math.log((step.seconds + step.asking_s) / step.without_s)
        gained = step.log_tokens / step.num_sequences - slower
        gained = max(-_MOST_GAINED, min(_MOST_GAINED, gained))
        self._bar = max(0.0, min(_HIGHEST, self._bar - _RATE * gained))
        return gained
