"""A sequence of tokens whose KV lives in blocks: the book-keeping that both schedulers share.

    tokens    |=========== num_computed ===========|---- remaining ----|
    blocks    | b0 | b1 | b2 | b3 | b4 |                                  capacity() = len(blocks) * block_tokens
    hashes    | h0 | h1 | h2 |                                            registered, full and computed

Owned by one scheduler, on the engine's thread. It knows neither requests nor sampling; it names blocks that the block manager
owns, and every block in `blocks` is one reference held by this sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.blocks import BlockHash, next_hash, num_blocks
from common.engine.batch import SampleSpec, SequenceSlice
from common.engine.block_manager import BlockManager


class PagedSequence:
    def __init__(self, token_ids: Sequence[int], root: BlockHash, block_tokens: int, names: Sequence[BlockHash] = ()) -> None:
        """`names` are those of its first full blocks, as far as they have been worked out."""
        self.names = names
        self.tokens = list(token_ids)
        self.blocks: list[int] = []
        self.num_computed = 0
        self._block_tokens = block_tokens
        self._root = root
        self._num_hashed = 0
        self._last_hash = root

    @property
    def remaining(self) -> int:
        """Tokens that are known but not yet in KV."""
        return len(self.tokens) - self.num_computed

    def missing_blocks(self, num_tokens: int) -> int:
        """How many more blocks it takes to hold `num_tokens` tokens."""
        return max(0, num_blocks(num_tokens, self._block_tokens) - len(self.blocks))

    def attach(self, blocks: Sequence[int], num_computed: int) -> None:
        """Takes over references to blocks that already hold the first `num_computed` tokens, and room after them."""
        self.blocks = list(blocks)
        self.num_computed = num_computed

    def replace(self, first: int, blocks: Sequence[int]) -> list[int]:
        """Takes over references to blocks in the place of its own from the `first` on, of which none is full yet, and gives
        those back to the caller. What of the new ones is computed, `advance` is told."""
        end = first + len(blocks)
        replaced, self.blocks[first:end] = self.blocks[first:end], blocks
        return replaced

    def detach(self) -> list[int]:
        """Gives all references back to the caller; what was computed must be computed again."""
        blocks, self.blocks = self.blocks, []
        self.num_computed = 0
        self._num_hashed = 0
        self._last_hash = self._root
        return blocks

    def slice(
        self,
        count: int,
        samples: tuple[SampleSpec, ...] = (),
        *,
        drafts: Sequence[int] = (),
        prompt_logprobs: int | None = None,
        under_way: int = 0,
        placeholder: int | None = None,
    ) -> SequenceSlice:
        """The next `count` tokens as a share of a step, behind `under_way` tokens that another step computes meanwhile; `drafts`
        are guesses of what follows the last token there is. `placeholder` stands for one token, the only one of the share, that
        the other step is to draw (`in_flight_step`)."""
        start = self.num_computed + under_way
        end = start + count
        if placeholder is not None:
            return SequenceSlice([placeholder], start, self.blocks[: num_blocks(end, self._block_tokens)], samples)
        return SequenceSlice(
            token_ids=[*self.tokens[start:end], *drafts],
            start=start,
            block_table=self.blocks[: num_blocks(end + len(drafts), self._block_tokens)],
            samples=samples,
            num_drafts=len(drafts),
            prompt_logprobs=prompt_logprobs,
            next_token_ids=self.tokens[start + 1 : end + 1] if prompt_logprobs is not None else (),
        )

    def trim(self, num_tokens: int) -> list[int]:
        """Gives the references to the blocks back to the caller that it does not take to hold `num_tokens` tokens."""
        kept = num_blocks(num_tokens, self._block_tokens)
        if kept >= len(self.blocks):
            return []
        self.blocks, spare = self.blocks[:kept], self.blocks[kept:]
        return spare

    def advance(self, count: int, manager: BlockManager) -> None:
        """After a step computed `count` more tokens: full blocks become findable by their content. Only what is in `tokens`
        counts: the KV of a draft that was wrong is written over by the next step, before anybody reads it."""
        self.num_computed += count
        while (self._num_hashed + 1) * self._block_tokens <= self.num_computed:
            self._last_hash = self._name_of(self._num_hashed)
            manager.register(self.blocks[self._num_hashed], self._last_hash)
            self._num_hashed += 1

    def _name_of(self, index: int) -> BlockHash:
        """Of the block behind the one that was named last."""
        if index < len(self.names):
            return self.names[index]
        start = index * self._block_tokens
        return next_hash(self._last_hash, self.tokens[start : start + self._block_tokens])
