"""Who waits for blocks, in the order of their turns, and who may go before whom.

    turn = arrival + priority * priority_aging_s          those whose KV lies in swap space go before all others

A turn never changes, and it is what ages: a request of priority p that came at t goes before every one of priority q that comes
after t + (p - q) * priority_aging_s. So there is a moment from which on nobody who comes can be put before it, and nothing
starves, however urgent the rest of the traffic. Within a priority it is first come, first served. The same turns order who runs:
the latest turn is preempted first, and the earliest prompt is served first (`prompt_budget`).

*Short against long.* A request that finds no room, because it needs many blocks, is overtaken by later ones that fit: by at most
`max_overtaken` of them in all. From then on nobody goes before it, what becomes free is kept for it, and so it waits no longer
than it takes the answers in progress to give their blocks back. That is the bound: within a priority nobody sees more than
`max_overtaken` later requests served before it, whatever their sizes.

Owned by the scheduler. It knows neither blocks nor how much of them anybody needs.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator

from decode_worker.generation import Choice

_MOST_ASKED = 8  # that find no room, before a step gives up looking for one who does


class WaitingLine:
    def __init__(self, max_overtaken: int) -> None:
        self._max_overtaken = max_overtaken
        self._choices: list[Choice] = []

    def __len__(self) -> int:
        return len(self._choices)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self._choices)

    def __contains__(self, choice: Choice) -> bool:
        return choice in self._choices

    def add(self, choice: Choice) -> None:
        insort(self._choices, choice, key=_place)

    def remove(self, choice: Choice) -> None:
        self._choices.remove(choice)

    def admit(
        self,
        fits: Callable[[Choice], bool],
        begin: Callable[[Choice], None],
        waits: Callable[[Choice], bool] = lambda _: False,
    ) -> None:
        """Has those begin who are next and fit. `fits` reserves what it takes; `begin` is called when the choice has left. Who
        `waits` for something else than room is not asked, and not overtaken by who goes on."""
        passed: list[Choice] = []
        for choice in list(self._choices):
            if len(passed) == _MOST_ASKED or any(other.num_overtaken >= self._max_overtaken for other in passed):
                return
            if waits(choice):
                continue
            if fits(choice):
                for other in passed:
                    other.num_overtaken += 1
                self._choices.remove(choice)
                begin(choice)
            else:
                passed.append(choice)


def _place(choice: Choice) -> tuple[bool, float, int, int]:
    return choice.swapped is None, *choice.turn
