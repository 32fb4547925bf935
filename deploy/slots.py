"""What Ray holds for each worker, when workers have changed their roles since they were started.

    take(role, ranks, offered) -> Place ... Place.becomes(role, ranks) ... Place.leave()

Ray cannot move a running actor from one resource to another, so a prefill worker that became a decode worker keeps its prefill
slot and the CPUs of its ranks. What is asked of Ray next makes up for it: the worker to come takes the slot that brings the
counts together, so that as many slots of each role are in use as workers, and Ray's autoscaler starts the hosts that are missing.
Where that slot is not free and the other one is, it takes the other one if a flip has left it: hosts that nobody can add to serve
all their workers again after a loss or a roll. Who never flips is never put in a slot of the other role.

It knows neither Ray nor processes; it forgets a place when it is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from common.types import Role

_OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


@dataclass(slots=True, eq=False)
class Place:
    """Of one process, from before its start to its end."""

    book: SlotBook
    slot: Role  # whose slot it is
    held_ranks: int
    role: Role  # what its worker is now
    ranks: int

    def becomes(self, role: Role, ranks: int) -> None:
        """Its worker is to be another one in the same process."""
        if role is not self.role:
            self.book.flipped(role)
        self.role, self.ranks = role, ranks

    def leave(self) -> None:
        """Idempotent."""
        self.book.places.discard(self)


class SlotBook:
    def __init__(self) -> None:
        self.places: set[Place] = set()
        self._flips: Counter[Role] = Counter()  # to this role, less those from it

    def take(self, role: Role, ranks: int, offered: Mapping[Role, int]) -> Place:
        """`offered`: the slots of all hosts that are alive. The slot need not be free: then Ray is to find a host for it."""
        other = _OTHER[role]
        in_ours = self._num(role=other, slot=role)
        in_theirs = self._num(role=role, slot=other)
        slot, second = (other, role) if in_ours > in_theirs else (role, other)
        free = {kind: offered[kind] - sum(place.slot is kind for place in self.places) for kind in Role}
        if free[slot] < 1 <= free[second] and (second is role or in_theirs - in_ours < self._flips[role]):
            slot = second
        place = Place(self, slot, ranks, role, ranks)
        self.places.add(place)
        return place

    def flipped(self, role: Role) -> None:
        self._flips[role] += 1
        self._flips[_OTHER[role]] -= 1

    def asked_ranks(self, wanted_ranks: Iterable[int]) -> list[int]:
        """For workers of so many ranks, what Ray has to hold in all: who has changed its ranks holds what it was started with."""
        asked = Counter(wanted_ranks)
        for place in self.places:
            if place.held_ranks != place.ranks and asked[place.ranks]:
                asked[place.ranks] -= 1
                asked[place.held_ranks] += 1
        return sorted(asked.elements())

    def _num(self, *, role: Role, slot: Role) -> int:
        return sum(place.role is role and place.slot is slot for place in self.places)
