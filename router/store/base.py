"""The seam between the router's caches and what keeps their entries.

A value is bound to *epochs*: for each name that it depends on (`tenant:<digest>`, `model:<name>`, `tag:<tag>`), the state of that
name before the value was computed. The way of an entry:

    reading = await store.get(key, names)     value and epochs of this very moment, in one round trip
    reading.value is not None                 verified, within its time, and nothing it depends on was invalidated: serve it
    reading.value is None                     compute; afterwards store.put(key, value, ttl_s=..., epochs=reading.epochs)
    reading.epochs is None                    the store is away: compute, and neither put nor share the answer
    await store.invalidate(names)             every value bound to an earlier epoch of one of the names is gone, everywhere

The guarantee: a `get` that begins after an `invalidate` of one of its names has returned, in whatever replica, does not return
a value that was put with epochs read before. It holds because `get` compares the value's epochs with those that the store holds
at that moment, and because `put` takes the epochs of an earlier reading, so an answer whose computation began before an
invalidation cannot outlive it. For the same reason, who shares an answer that is still being computed must compare
`Reading.epochs` (they are hashable).

Nothing here fails a request: `get` answers within the configured time, if need be with nothing, and `put` neither waits nor
raises. Only `delete` and `invalidate` raise, for their caller wants to know: StoreUnavailable, which may be tried again.

Values are opaque bytes. A store knows no request, token or prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_KEY_BYTES = 256
MAX_NAME_BYTES = 256
MAX_NAMES = 64


@dataclass(frozen=True, slots=True)
class Epoch:
    """The state of one name. Only equality means something: a store that lost its counters starts at others."""

    counter: int
    incarnation: bytes  # random; a store that was emptied has a new one


@dataclass(frozen=True, slots=True)
class Epochs:
    """The epochs of some names at one moment: sorted by name, each name once, hashable."""

    pairs: tuple[tuple[str, Epoch], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.pairs)


@dataclass(frozen=True, slots=True)
class Reading:
    """What `get` found. With `epochs` None the store is away, and there is no value either."""

    value: bytes | None
    epochs: Epochs | None


AWAY = Reading(None, None)


@dataclass(frozen=True, slots=True)
class Inserted:
    """A value was put, here or by another replica; read it with `get(key, names)`."""

    key: bytes
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deleted:
    """Values are gone: deleted, or evicted or expired where the store notices. Not every loss is told: `get` says what is."""

    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Invalidated:
    """What is bound to one of these names from before is gone."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget everything: the store was emptied, or changes were missed. Those that are still known follow."""


Change = Inserted | Deleted | Invalidated | Reset
Listener = Callable[[Change], None]
"""Called on the event loop, in the order in which things happened; must neither wait nor raise."""


class Store(Protocol):
    """One per router. `run` is a task of the process; `close` is called once, after `run` was cancelled."""

    async def get(self, key: bytes, names: Sequence[str]) -> Reading:
        """The value if it is verified and current, and the epochs of `names` now. `names` must hold those of the put."""
        ...

    def put(self, key: bytes, value: bytes, *, ttl_s: float, epochs: Epochs) -> None:
        """Keeps a value, bound to the epochs read before it was computed. Dropped and counted if it cannot be kept."""
        ...

    async def delete(self, keys: Sequence[bytes]) -> None:
        """No replica reads these any more once it returns. Raises StoreUnavailable."""
        ...

    async def invalidate(self, names: Sequence[str]) -> None:
        """Durable, and in force in all replicas, when it returns. Raises StoreUnavailable; it may have been done even so."""
        ...

    def subscribe(self, listener: Listener) -> None:
        """Tells of changes, of this and of other replicas, from the next `run` on."""
        ...

    async def run(self) -> None:
        """Ends only by cancellation."""
        ...

    async def close(self) -> None: ...


def check_key(key: bytes) -> None:
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"a key has 1 to {MAX_KEY_BYTES} bytes, this one {len(key)}")


def sorted_names(names: Sequence[str]) -> tuple[str, ...]:
    """Each name once, in order."""
    found = tuple(sorted(set(names)))
    if len(found) > MAX_NAMES:
        raise ValueError(f"at most {MAX_NAMES} names, not {len(found)}")
    for name in found:
        if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"a name of an epoch has 1 to {MAX_NAME_BYTES} bytes: {name[:64]!r}")
    return found
