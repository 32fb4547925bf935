"""Which worker holds which block: key of a block -> set of workers, as the workers report it and as dispatches promise it.

    h0 ──> {0, 1, 2, 5}      match([h0, h1, h2, h3]) -> 3 blocks on {2}, 1 block on {0, 1, 5}
    h1 ──> {2}               a worker that holds a block holds those before it, so a run of equal sets is crossed in
    h2 ──> {2}               growing steps and its end found by halving
    h3 ──> {}

A worker has a slot, its bit in the sets. A worker that is gone, or whose changes were missed, loses its slot at once; its bits
are swept out of the sets bit by bit, and only then is the slot given out again. A block that a dispatch will bring about counts
from the dispatch on, for `speculative_ttl_s` or until the worker says that it has it; `there_s` tells when that is expected.

60-bit keys may collide, and a worker may have evicted a block a moment ago: the index is for guessing. Workers look at the
whole hash before they use a block. It knows no clock; `now_s` is handed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from common.blocks import BlockKey

_SWEEP_BLOCKS = 2048  # looked at per call, so that no call takes long
_MAX_INTERNED = 65_536


@dataclass(frozen=True, slots=True)
class Match:
    """Workers that hold exactly the first `num_blocks` blocks of a prompt (as far as it was asked for)."""

    num_blocks: int
    slots: int  # one bit per slot


def slots_of(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


class PrefixIndex:
    def __init__(self, *, max_blocks: int, speculative_ttl_s: float) -> None:
        self._max_blocks = max_blocks
        self._ttl_s = speculative_ttl_s
        self._holders: dict[BlockKey, int] = {}
        self._interned: dict[int, int] = {}  # equal sets share one object
        self._promised: dict[BlockKey, dict[int, tuple[float, float]]] = {}  # slot -> until when, and when it is kept
        self._promises: deque[tuple[float, int, tuple[BlockKey, ...]]] = deque()  # in order of their end
        self._alive = 0
        self._num_slots = 0
        self._free: list[int] = []
        self._retired = 0  # slots whose bits may still be in the sets
        self._sweeping = 0  # of them, those that the sweep under way takes out
        self._sweep: Iterator[BlockKey] | None = None
        self.dropped = 0  # blocks that were not taken in because the index is full

    def __len__(self) -> int:
        return len(self._holders)

    # -- workers -------------------------------------------------------------------------------------------------------

    def add(self) -> int:
        """A slot for a worker, which holds nothing yet."""
        slot = self._free.pop() if self._free else self._num_slots
        self._num_slots = max(self._num_slots, slot + 1)
        self._alive |= 1 << slot
        return slot

    def drop(self, slot: int) -> None:
        """Forgets a worker at once. The slot means nothing from here on."""
        self._alive &= ~(1 << slot)
        self._retired |= 1 << slot

    # -- blocks --------------------------------------------------------------------------------------------------------

    def apply(self, slot: int, registered: Iterable[BlockKey], evicted: Iterable[BlockKey]) -> None:
        """What a worker says that it holds now and holds no longer."""
        bit, holders, interned = 1 << slot, self._holders, self._interned
        if len(interned) > _MAX_INTERNED:
            interned.clear()
        for key in registered:
            old = holders.get(key)
            if old is None:
                if len(holders) >= self._max_blocks:
                    self.dropped += 1
                    continue
                holders[key] = interned.setdefault(bit, bit)
            elif not old & bit:
                new = old | bit
                holders[key] = interned.setdefault(new, new)
            if self._promised:
                self._keep_promise(slot, key)
        for key in evicted:
            old = holders.get(key, 0)
            if old & bit:
                new = old & ~bit
                if new:
                    holders[key] = interned.setdefault(new, new)
                else:
                    del holders[key]
        self.sweep()

    def promise(self, slot: int, keys: Sequence[BlockKey], now_s: float, there_s: float = 0.0) -> None:
        """A dispatch will bring these blocks to a worker, by then as far as known."""
        self._forget_promises(now_s)
        until_s = now_s + self._ttl_s
        bit, holders, promised = 1 << slot, self._holders, self._promised
        new = tuple(key for key in keys if not holders.get(key, 0) & bit)
        if not new or len(promised) + len(new) > self._max_blocks:
            return
        for key in new:
            slots = promised.setdefault(key, {})
            sooner = slots.get(slot)
            slots[slot] = until_s, there_s if sooner is None else min(there_s, sooner[1])
        self._promises.append((until_s, slot, new))

    def holders(self, key: BlockKey) -> int:
        """Slots, some of which may be nobody's any more."""
        bits = self._holders.get(key, 0)
        if self._promised:
            for slot in self._promised.get(key, ()):
                bits |= 1 << slot
        return bits

    def there_s(self, slot: int, key: BlockKey) -> float:
        """When the worker is expected to have a block that it is said to hold; 0 if it has."""
        slots = self._promised.get(key)
        return 0.0 if slots is None or slot not in slots else slots[slot][1]

    def match(self, keys: Sequence[BlockKey], now_s: float) -> list[Match]:
        """Everybody who holds the beginning of a prompt, most blocks first."""
        self._forget_promises(now_s)
        found: list[Match] = []
        depth, bits = 0, self._alive  # the workers `bits` hold the first `depth` blocks
        while bits:
            # The first block that not all of them hold: in growing steps as far as all do, then by halving.
            known, step = depth, 1
            while (ahead := min(known + step, len(keys))) > known and self.holders(keys[ahead - 1]) & bits == bits:
                known, step = ahead, 2 * step
            if known == len(keys):
                found.append(Match(known, bits))
                break
            beyond = min(known + step, len(keys))
            while beyond - known > 1:
                middle = (known + beyond) // 2
                if self.holders(keys[middle - 1]) & bits == bits:
                    known = middle
                else:
                    beyond = middle
            on = self.holders(keys[beyond - 1]) & bits
            if known:
                found.append(Match(known, bits & ~on))
            depth, bits = beyond, on
        found.reverse()
        return found

    def sweep(self) -> None:
        """Takes a part of the bits of retired slots out."""
        if not self._retired:
            return
        if self._sweep is None:
            self._sweeping, self._sweep = self._retired, iter(list(self._holders))
        holders, keep, interned = self._holders, ~self._sweeping, self._interned
        for _ in range(_SWEEP_BLOCKS):
            key = next(self._sweep, None)
            if key is None:
                self._end_sweep()
                return
            old = holders.get(key, 0)
            if old & self._sweeping:
                new = old & keep
                if new:
                    holders[key] = interned.setdefault(new, new)
                else:
                    del holders[key]

    def _end_sweep(self) -> None:
        waiting = {slot for _, slot, _ in self._promises}  # a promise to a slot must not be kept by its next owner
        for slot in slots_of(self._sweeping):
            if slot not in waiting:
                self._retired &= ~(1 << slot)
                self._free.append(slot)
        self._sweeping, self._sweep = 0, None

    def _keep_promise(self, slot: int, key: BlockKey) -> None:
        slots = self._promised.get(key)
        if slots is not None and slots.pop(slot, None) is not None and not slots:
            del self._promised[key]

    def _forget_promises(self, now_s: float) -> None:
        while self._promises and self._promises[0][0] <= now_s:
            _, slot, keys = self._promises.popleft()
            for key in keys:
                slots = self._promised.get(key)
                if slots is not None and slot in slots and slots[slot][0] <= now_s:
                    self._keep_promise(slot, key)
