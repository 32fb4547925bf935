"""Who owns which block of the KV pool: references, the prefix cache, and quarantine. Knows block numbers, no memory.

    free ----allocate----> used ----release, registered----> cached (LRU, still findable by hash)
     ^ ^                   | ^ |                               |  |
     | |                   | | +--release, unregistered--+     |  |
     | |                   | +---------acquire-----------|-----+  |
     | +-------------------|-----------------------------+        |
     | |                   +--quarantine--> in transfer --end_quarantine--> free
     | +----------------------------allocate evicts---------------+

Every block is in exactly one of the four states, so `free + cached + used + in_transfer == total` always. A used block has one
reference per sequence that holds it. A block's content is named by a hash of its whole prefix (`common.blocks`); only full
blocks whose content was computed here, or verified on arrival, may be registered. The first block to bear a hash keeps it.

Blocks below `first_block` belong to the pool itself (its null block) and are never handed out. A call that breaks the rules is a
bug of the caller: it raises IllegalTransition and changes nothing. One thread uses a manager.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from common.blocks import BlockHash, hash_chain
from common.errors import IllegalTransition


class BlockManager:
    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        root: Callable[[str], BlockHash],
        *,
        prefix_cache: bool = True,
        first_block: int = 0,
    ) -> None:
        """Manages the blocks `first_block .. num_blocks - 1`. `root` maps a cache salt to the head of its hash chains."""
        self.block_tokens = block_tokens
        self.prefix_cache = prefix_cache
        self.first_block = first_block
        self._num_blocks = num_blocks
        self._root = root
        self._free = list(range(num_blocks - 1, first_block - 1, -1))
        self._references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._in_transfer: set[int] = set()
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._on_findable: Callable[[BlockHash, bool], None] | None = None

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def num_total(self) -> int:
        return self._num_blocks - self.first_block

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Findable blocks that nobody holds; they are given up when free ones run out."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._references)

    @property
    def num_in_transfer(self) -> int:
        return len(self._in_transfer)

    @property
    def num_available(self) -> int:
        """What `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    def num_references(self, block: int) -> int:
        return self._references.get(block, 0)

    def hash_of(self, block: int) -> BlockHash | None:
        """What it can be found by; None if it cannot."""
        return self._hash_of.get(block)

    @property
    def hashes(self) -> Iterable[BlockHash]:
        """Of every block that can be found now."""
        return self._block_of.keys()

    def tell(self, on_findable: Callable[[BlockHash, bool], None] | None) -> None:
        """Has every hash reported that can be found from now on (True), or no longer (False). One listener at a time."""
        self._on_findable = on_findable

    def root(self, salt: str) -> BlockHash:
        """The head of the hash chains of one tenant's partition; `common.blocks.next_hash` continues it."""
        return self._root(salt)

    def match_prefix(self, token_ids: Sequence[int], salt: str, max_tokens: int) -> list[int]:
        """The longest run of findable blocks that holds a prefix of `token_ids` of at most `max_tokens` tokens.

        Only a look: the blocks may be evicted by the next `allocate` unless `acquire` takes them first.
        """
        if not self.prefix_cache:
            return []
        usable = min(len(token_ids), max_tokens)
        return self.find(hash_chain(self._root(salt), token_ids[: max(usable, 0)], self.block_tokens))

    def find(self, chain: Iterable[BlockHash]) -> list[int]:
        """The blocks with these names, up to the first that is not there. Only a look, as `match_prefix`."""
        blocks: list[int] = []
        for block_hash in chain:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def has(self, block_hash: BlockHash) -> bool:
        return block_hash in self._block_of

    def can_allocate(self, count: int, *, keep_free: int = 0, reusing: Sequence[int] = ()) -> bool:
        """Whether `acquire(reusing)` and then `allocate(count)` would work and leave `keep_free` blocks available."""
        revived = sum(1 for block in reusing if block in self._cached)
        return count + keep_free + revived <= self.num_available

    # -- taking --------------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Fresh blocks with one reference each. Ask `can_allocate` first: it raises when there are too few."""
        if count < 0 or count > self.num_available:
            raise IllegalTransition(f"{count} blocks asked for, {self.num_available} available")
        while len(self._free) < count:
            self._evict_oldest()
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def acquire(self, blocks: Sequence[int]) -> None:
        """Takes one reference to each matched block, reviving those that nobody holds."""
        for block in blocks:
            if block not in self._references and block not in self._cached:
                raise IllegalTransition(f"block {block} is neither used nor cached")
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] = self._references.get(block, 0) + 1

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block that its owner already holds (n > 1: choices share their prompt)."""
        self._demand_used(blocks)
        for block in blocks:
            self._references[block] += 1

    def register(self, block: int, block_hash: BlockHash) -> bool:
        """Makes a used, full, verified block findable. False if it is not (hash taken by another block, or no cache)."""
        self._demand_used((block,))
        known = self._hash_of.get(block)
        if known is not None and known != block_hash:
            raise IllegalTransition(f"block {block} already bears another hash")
        if not self.prefix_cache:
            return False
        if self._block_of.setdefault(block_hash, block) != block:
            return False
        self._hash_of[block] = block_hash
        if known is None and self._on_findable is not None:
            self._on_findable(block_hash, True)
        return True

    # -- giving back ---------------------------------------------------------------------------------------------------

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference to each. `blocks` come in sequence order; the tail is evicted before its head."""
        self._demand_used(blocks)
        for block in reversed(blocks):
            remaining = self._references[block] - 1
            if remaining:
                self._references[block] = remaining
                continue
            del self._references[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def quarantine(self, blocks: Sequence[int]) -> None:
        """The owner leaves while a writer may still write: its references pass to the writer until `end_quarantine`.

        The owner must be the only one and the blocks must not be findable, as is true of any transfer's destination.
        """
        self._demand_used(blocks)
        for block in blocks:
            if self._references[block] != 1 or block in self._hash_of:
                raise IllegalTransition(f"block {block} is shared or findable; a writer must not own it")
        for block in blocks:
            del self._references[block]
            self._in_transfer.add(block)

    def end_quarantine(self, blocks: Sequence[int]) -> None:
        """No authorised writer is left: the blocks are free."""
        for block in blocks:
            if block not in self._in_transfer:
                raise IllegalTransition(f"block {block} is not in quarantine")
        if len(set(blocks)) != len(blocks):
            raise IllegalTransition("a block is named twice")
        self._in_transfer.difference_update(blocks)
        self._free.extend(reversed(blocks))

    def drop_cache(self) -> int:
        """Forgets every cached block that nobody holds; returns how many became free."""
        count = len(self._cached)
        while self._cached:
            self._evict_oldest()
        return count

    def check_integrity(self) -> None:
        """Raises IllegalTransition unless every block is in exactly one state and the hash maps agree. Linear in blocks."""
        states = [*self._free, *self._cached, *self._references, *self._in_transfer]
        if sorted(states) != list(range(self.first_block, self._num_blocks)):
            raise IllegalTransition(
                f"free {self.num_free} + cached {self.num_cached} + used {self.num_used} + in transfer {self.num_in_transfer}"
                f" is not a partition of {self.num_total} blocks"
            )
        if any(count < 1 for count in self._references.values()):
            raise IllegalTransition("a used block has no reference")
        if {block: block_hash for block_hash, block in self._block_of.items()} != self._hash_of:
            raise IllegalTransition("the hash maps disagree")
        if any(block not in self._references and block not in self._cached for block in self._hash_of):
            raise IllegalTransition("a block is findable that is neither used nor cached")
        if any(block not in self._hash_of for block in self._cached):
            raise IllegalTransition("a cached block has no hash")

    # ------------------------------------------------------------------------------------------------------------------

    def _evict_oldest(self) -> None:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        self._free.append(block)
        if self._on_findable is not None:
            self._on_findable(block_hash, False)

    def _demand_used(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block not in self._references:
                raise IllegalTransition(f"block {block} is not in use")
        if len(set(blocks)) != len(blocks):
            raise IllegalTransition("a block is named twice")
