"""The blocks of choices: reserved, grown, shared, given back, or given up for swap space.

*Room to grow.* A choice is given the blocks of the tokens that it has, and one more whenever it fills one, so that memory is not
tied up for answers that end early. Whoever is admitted must leave room for those in progress: `watermark_blocks`, and what each
of them needs for its next `growth_tokens` tokens, or for as many as its max_tokens still allows. That is a reserve in the account
only: nobody owns it, and guesses may not use the watermark either. If it does not suffice, because many answers grow far, the
latest turn gives its blocks up (`scheduler`).

*What a step under way writes to stays.* Blocks of a choice that ends meanwhile are kept with it (`retired`) until `let_go`.

It orders copies, of blocks and to and from swap space, and makes none. It owns the block manager's references of all choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.blocks import num_blocks
from common.engine.block_manager import BlockManager
from common.types import KVLayout
from decode_worker.generation import Choice
from decode_worker.swapping import Swapping

Orders = tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]


class Holdings:
    def __init__(
        self, layout: KVLayout, blocks: BlockManager, swapping: Swapping | None, *, watermark_blocks: int, growth_tokens: int
    ) -> None:
        self._block_tokens = layout.block_tokens
        self._blocks = blocks
        self._swapping = swapping
        self._watermark_blocks = watermark_blocks
        self._growth_tokens = growth_tokens
        self._copies: list[tuple[int, int]] = []
        self._returning: list[Choice] = []  # whose slots are read by copies that were ordered

    @property
    def has_copies(self) -> bool:
        return bool(self._copies)

    def take_orders(self) -> Orders:
        """Copies of blocks, what is brought in, and what is put out."""
        copies, self._copies = tuple(self._copies), []
        if self._swapping is None:
            return copies, (), ()
        orders = self._swapping.take_orders()
        for choice in self._returning:
            self._drop_swapped(choice)
        self._returning = []
        return copies, *orders

    # -- taking --------------------------------------------------------------------------------------------------------

    def reserve(self, choice: Choice, in_progress: Sequence[Choice]) -> int | None:
        """Blocks for all the choice's tokens, reusing cached ones for what can be reused, and leaving room for others to grow.
        How many tokens were found in the cache; None if there is no room."""
        available = self._blocks.num_available
        if choice.refused is not None and available <= choice.refused[0] and len(in_progress) >= choice.refused[1]:
            return None  # as when it last asked
        generation, sequence = choice.generation, choice.sequence
        cached: list[int] = []
        most_tokens = len(sequence.tokens) - 1
        if generation.prompt_in_kv:
            cached = self._blocks.match_prefix(sequence.tokens, generation.request.cache_salt, max_tokens=most_tokens)
        elif not generation.wants_prompt_logprobs:
            cached = self._blocks.find(sequence.names[: most_tokens // self._block_tokens])
        self._blocks.acquire(cached)
        missing = sequence.missing_blocks(len(sequence.tokens)) - len(cached)
        if not self._blocks.can_allocate(missing, keep_free=self._growth(in_progress)):
            self._blocks.release(cached)
            choice.refused = available, len(in_progress)
            return None
        choice.refused = None
        blocks = [*cached, *self._blocks.allocate(missing)]
        cached_tokens = len(cached) * self._block_tokens
        if choice.swapped is None or self._swapping is None:
            sequence.attach(blocks, 0)
            sequence.advance(cached_tokens, self._blocks)
        else:  # its blocks become findable when the next token is accounted for: then they have their content
            sequence.attach(blocks, max(cached_tokens, choice.swapped.num_computed))
            self._swapping.bring_in(choice.swapped, blocks, len(cached))
            self._returning.append(choice)
        return cached_tokens

    def grow(self, choice: Choice) -> bool:
        """A block for its next token, if it lacks one. False: there is none."""
        missing = choice.sequence.missing_blocks(choice.length_ahead)
        if not missing:
            return True
        if not self._blocks.can_allocate(missing):
            return False
        choice.sequence.blocks.extend(self._blocks.allocate(missing))
        return True

    def grow_all(self, choices: Iterable[Choice]) -> bool:
        """The same for all of them, or for none."""
        missing = [(choice, choice.sequence.missing_blocks(choice.length_ahead)) for choice in choices]
        if not self._blocks.can_allocate(sum(count for _, count in missing)):
            return False
        for choice, count in missing:
            if count:
                choice.sequence.blocks.extend(self._blocks.allocate(count))
        return True

    def grow_for_drafts(self, choice: Choice, drafts: Sequence[int]) -> Sequence[int]:
        """As many of them as fit behind its last token without taking a block from anybody; it has room for them now."""
        sequence = choice.sequence
        spare = max(0, self._blocks.num_available - self._watermark_blocks)
        room = (len(sequence.blocks) + spare) * self._block_tokens - len(sequence.tokens)
        taken = drafts[: max(0, room)]
        sequence.blocks.extend(self._blocks.allocate(sequence.missing_blocks(len(sequence.tokens) + len(taken))))
        return taken

    def fork(self, prompt: Choice, choice: Choice) -> bool:
        """The choice shares the prompt's full blocks; a partly filled one is copied, for each will write to it. False: no
        room."""
        source = prompt.sequence
        num_tokens = source.num_computed
        num_full = num_tokens // self._block_tokens
        has_partial = num_tokens % self._block_tokens != 0
        if has_partial and not self._blocks.can_allocate(1):
            return False
        shared = source.blocks[:num_full]
        self._blocks.share(shared)
        own = self._blocks.allocate(1) if has_partial else []
        if has_partial:
            self._copies.append((source.blocks[num_full], own[0]))
        choice.sequence.attach([*shared, *own], 0)
        choice.sequence.advance(num_tokens, self._blocks)
        return True

    # -- giving --------------------------------------------------------------------------------------------------------

    def trim(self, choice: Choice) -> None:
        """Gives back what its tokens do not need. A step under way may write behind them: the token before was to be one more,
        and was the one that ends the answer."""
        if not choice.num_steps_under_way and (spare := choice.sequence.trim(len(choice.sequence.tokens))):
            self._blocks.release(spare)

    def put_out(self, choice: Choice) -> bool:
        """Its KV goes to swap space, and its blocks are given back. False: it stays as it is."""
        sequence, swapping = choice.sequence, self._swapping
        if swapping is None or choice.num_steps_under_way or not choice.generation.prompt_in_kv:
            return False
        if choice.swapped is None:
            kept = sequence.blocks[: num_blocks(sequence.num_computed, self._block_tokens)]
            if any(target in kept for _, target in self._copies):
                return False  # it has no content yet
            num_shared = sum(self._blocks.num_references(block) > 1 for block in kept)
            num_lost = max(0, sequence.num_computed - num_shared * self._block_tokens)
            names = [self._blocks.hash_of(block) for block in kept]
            choice.swapped = swapping.put_out(kept, names, sequence.num_computed, num_lost)
            if choice.swapped is None:
                return False
        else:  # it was about to come back
            self._returning.remove(choice)
        self._detach(choice)
        return True

    def give_back(self, choice: Choice) -> None:
        """All that it has, here and in swap space."""
        self._detach(choice)
        if choice in self._returning:
            self._returning.remove(choice)
        self._drop_swapped(choice)

    def let_go(self, choice: Choice) -> None:
        """A step under way of a choice that has ended is over."""
        if not choice.num_steps_under_way:
            self._blocks.release(choice.retired)
            choice.retired = []

    # -- within --------------------------------------------------------------------------------------------------------

    def _growth(self, in_progress: Sequence[Choice]) -> int:
        if not in_progress:
            return 0
        missing = 0
        for choice in in_progress:
            length = len(choice.sequence.tokens) + self._growth_tokens
            missing += choice.sequence.missing_blocks(min(length, choice.most_length))
        return self._watermark_blocks + missing

    def _detach(self, choice: Choice) -> None:
        """Its blocks, and with them the copies that were still to be made into them."""
        blocks = choice.sequence.detach()
        self._copies = [copy for copy in self._copies if copy[1] not in blocks]
        if self._swapping is not None:
            self._swapping.forget(blocks)
        if choice.num_steps_under_way:
            choice.retired = blocks
        else:
            self._blocks.release(blocks)

    def _drop_swapped(self, choice: Choice) -> None:
        if self._swapping is not None and choice.swapped is not None:
            self._swapping.space.drop(choice.swapped.slots)
            choice.swapped = None
