"""All questions that have answers, by scope, at most so many: the oldest make room, and each leaves when its time is over.

A scope is a closed world: a look-up sees the questions of one scope, and a tenant is part of what makes a scope.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from router.semantic.embedder import Vector
from router.semantic.matching import Known, Scope


class Library:
    def __init__(self, *, dimensions: int, max_entries: int) -> None:
        self._dimensions = dimensions
        self._max_entries = max_entries
        self._scopes: dict[bytes, Scope] = {}
        self._names: dict[bytes, frozenset[str]] = {}  # of the epochs that a scope depends on
        self._order: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()  # answer key: scope, when it expires; oldest first
        self.let_go = False  # some question, for want of room

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def scope(self, scope: bytes) -> Scope | None:
        return self._scopes.get(scope)

    def add(self, scope: bytes, known: Known, vector: Vector, *, names: Iterable[str], expires_s: float) -> None:
        self.remove(known.key)
        while len(self._order) >= self._max_entries:
            self.remove(next(iter(self._order)))
            self.let_go = True
        place = self._scopes.get(scope)
        if place is None:
            place = self._scopes[scope] = Scope(self._dimensions)
            self._names[scope] = frozenset(names)
        place.add(known, vector)
        self._order[known.key] = (scope, expires_s)

    def remove(self, key: bytes) -> bool:
        found = self._order.pop(key, None)
        if found is None:
            return False
        scope = self._scopes[found[0]]
        scope.remove(key)
        if not len(scope):
            del self._scopes[found[0]], self._names[found[0]]
        return True

    def expire(self, now_s: float) -> None:
        """All live equally long, so the oldest go first."""
        while self._order:
            key, (_, expires_s) = next(iter(self._order.items()))
            if expires_s > now_s:
                return
            self.remove(key)

    def invalidate(self, names: Iterable[str]) -> None:
        wanted = frozenset(names)
        stale = {scope for scope, depends in self._names.items() if not depends.isdisjoint(wanted)}
        for key in [key for key, (scope, _) in self._order.items() if scope in stale]:
            self.remove(key)

    def clear(self) -> None:
        self._scopes.clear()
        self._names.clear()
        self._order.clear()
        self.let_go = False
