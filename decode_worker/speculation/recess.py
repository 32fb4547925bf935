"""Whether to ask for guesses at all: what asking came to, guesses or none, over the last so many steps that were asked about.

    asking, a window of steps ── lost more than a hundredth ──▶ recess, twice as long as the one before ──▶ asking ...
                              └─ else ──▶ asking, and the next recess is a short one again

A guess that pays in its own step may not pay for all the asking in vain between two of them. What is gained is counted as
`payoff` counts it. A small loss is borne, for guesses come in bursts: whoever does not ask misses the next one. A batch of
another size is another matter: eight chats may be better off without, and one alone with.
"""

from __future__ import annotations

from dataclasses import dataclass

_WINDOW_STEPS = 128  # about an answer: guesses come at its end, if they come
_BORNE = 0.01  # per step
_FIRST_STEPS, _MOST_STEPS = 128, 512


@dataclass(slots=True)
class _Account:
    asked_steps: int = 0  # of this window
    gained: float = 0.0
    left_steps: int = 0  # of the recess
    next_steps: int = _FIRST_STEPS


class Recess:
    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}
        self._account = _Account()  # of the last step that was asked about

    def is_on(self, num_sequences: int) -> bool:
        """Called once for each step that could be asked about. Sizes count as alike within a factor of two."""
        account = self._accounts.setdefault(num_sequences.bit_length(), _Account())
        if account.left_steps:
            account.left_steps -= 1
            return True
        self._account = account
        return False

    def gained(self, gained: float) -> None:
        """The logarithm of how much faster answers came in the last step that was asked about; the asking is in it."""
        account = self._account
        account.asked_steps += 1
        account.gained += gained
        if account.asked_steps < _WINDOW_STEPS:
            return
        if account.gained < -_BORNE * _WINDOW_STEPS:
            account.left_steps = account.next_steps
            account.next_steps = min(_MOST_STEPS, 2 * account.next_steps)
        else:
            account.next_steps = _FIRST_STEPS
        account.asked_steps, account.gained = 0, 0.0
