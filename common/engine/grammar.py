"""Grammars over a model's tokens: which tokens may come next, as a packed mask, one bit per token.

    Grammar --GrammarCompiler--> CompiledGrammar --start()--> GrammarState, one per choice --next_mask()--> NextMask, one per draw

A state is a function of the grammar and of the answer's tokens: it is advanced by the tokens of the sequence, wherever they were
drawn, and can be taken back. A mask is worked out later, by `MaskThread` while the model computes the step, or by whoever reads
it first. Masks have the bits of end tokens exactly when the text so far is a whole sentence; other special tokens never come.

A grammar that cannot be compiled is an InvalidRequest; so is one that runs into a limit on its way, or leaves nothing to draw
together with the request's other rules: then the request ends, and nobody else does. It knows neither logits nor requests' lives.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.engine.automata import Automaton, Compiler, Reader, Words, create_compiler, require
from common.errors import InvalidRequest, PdserveError
from common.metrics import MaskReadings
from common.tokenizer import Tokenizer
from common.types import Grammar

_Ids = npt.NDArray[np.int64]

MAX_COMPILED = 32


class GrammarCompiler:
    """One per engine. Thread-safe; blocks while it compiles, up to a second. The last `MAX_COMPILED` grammars stay."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, reader: Reader = "llguidance") -> None:
        """`vocab_size` is the width of the model's logits, which may be padded. Raises StartupError if `reader` is not there."""
        require(reader)
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._reader: Reader = reader
        self._compiler: Compiler | None = None
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()  # of the one above
        self._creating = threading.Lock()

    def prepare(self) -> None:
        """Before the first grammar, where that is not to wait for the library."""
        self._created()

    def cached(self, grammar: Grammar) -> CompiledGrammar | None:
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
            return found

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        found = self.cached(grammar)
        if found is not None:
            return found
        compiled = CompiledGrammar(self._created().compile(grammar), self._vocab_size)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def spell(self, text: str) -> list[int]:
        """As grammars spell text that is forced."""
        return self._created().spell(text)

    def _created(self) -> Compiler:
        with self._creating:  # takes a fifth of a second, so only models that are asked for grammars have one
            if self._compiler is None:
                self._compiler = create_compiler(self._reader, self._tokenizer, self._vocab_size)
            return self._compiler


class CompiledGrammar:
    """A grammar over one vocabulary; immutable, shared by all who use it."""

    def __init__(self, beginning: Automaton, vocab_size: int) -> None:
        self._beginning = beginning
        self._vocab_size = vocab_size
        self._lock = threading.Lock()

    def start(self) -> GrammarState:
        with self._lock:
            return GrammarState(self._beginning.copy(), self._vocab_size)


@dataclass(frozen=True, slots=True, eq=False)
class Restriction:
    """What a request's other rules say of the next token. They act after the grammar."""

    stop_token_ids: Sequence[int] = ()  # which may come where the text is whole
    allowed_token_ids: _Ids | None = None
    forced_token_ids: _Ids | None = None  # nothing but these, while one of them may come
    banned_token_ids: _Ids | None = None


class GrammarState:
    """How far one choice has come in its grammar. One thread at a time, and none while a mask of it is being worked out."""

    def __init__(self, automaton: Automaton, vocab_size: int) -> None:
        self._automaton = automaton
        self._vocab_size = vocab_size
        self._num_consumed = 0
        self._lost = False  # what followed is no beginning of a sentence: a guess that will be taken back
        self._pending: NextMask | None = None
        self._is_over: bool | None = None  # None: it was not asked since tokens came or went

    @property
    def num_consumed(self) -> int:
        """Tokens of the answer that it knows."""
        return self._num_consumed

    @property
    def is_over(self) -> bool:
        """The sentence is whole and nothing can follow it."""
        if self._is_over is None:
            self._is_over = self._automaton.is_over
        return not self._lost and self._is_over

    def consume(self, tokens: Sequence[int]) -> None:
        """The next tokens of the answer. From the first one that does not fit it knows nothing more, until it is rewound."""
        if not tokens or self._lost:
            return
        self._detach()
        self._is_over = None
        taken = self._automaton.consume(list(tokens))
        self._num_consumed += taken
        self._lost = taken < len(tokens)

    def rewind(self, num_tokens: int) -> None:
        """It knows only the first `num_tokens` of the answer."""
        if num_tokens < self._num_consumed:
            self._detach()
            self._is_over = None
            self._automaton.take_back(self._num_consumed - num_tokens)
            self._num_consumed = num_tokens
        self._lost = False

    def next_mask(self, restriction: Restriction, *, num_certain: int) -> NextMask | None:
        """What may come at this place; None where it does not matter: after a wrong guess, and after the end. The first
        `num_certain` tokens of the answer are no guesses: if one of those did not fit, nothing may be drawn any more."""
        if self.is_over or (self._lost and self._num_consumed >= num_certain and not self._automaton.has_failed):
            return None
        self._detach()
        if self._num_consumed > num_certain:
            # A guess may lead where the grammar is too much work, and an automaton never gets over that.
            return NextMask(self._automaton.copy(), self._vocab_size, restriction, lost=self._lost)
        self._pending = NextMask(self._automaton, self._vocab_size, restriction, lost=self._lost)
        return self._pending

    def _detach(self) -> None:
        """A mask that nobody has worked out yet keeps the state that it is about."""
        if self._pending is not None:
            self._pending.keep_state()
            self._pending = None


class NextMask:
    """The mask of one draw; worked out once, when it is first needed."""

    __slots__ = ("_automaton", "_error", "_lost", "_restriction", "_vocab_size", "_words")

    def __init__(self, automaton: Automaton, vocab_size: int, restriction: Restriction, *, lost: bool) -> None:
        self._automaton: Automaton | None = automaton
        self._lost = lost
        self._vocab_size = vocab_size
        self._restriction = restriction
        self._words: Words | None = None
        self._error: PdserveError | None = None

    @property
    def error(self) -> PdserveError | None:
        """Why no token can be drawn here."""
        self.work_out()
        return self._error

    @property
    def words(self) -> Words:
        """Raises what `error` says."""
        self.work_out()
        if self._words is None:
            raise self._error or InvalidRequest("no token may come", param="grammar")
        return self._words

    def allow(self, token_id: int) -> bool:
        self.work_out()
        return self._words is not None and bool(self._words[token_id >> 5] >> np.uint32(token_id & 31) & np.uint32(1))

    def keep_state(self) -> None:
        """The state that it was made from is about to move on."""
        if self._automaton is not None:
            self._automaton = self._automaton.copy()

    def work_out(self) -> None:
        automaton, self._automaton = self._automaton, None
        if automaton is None:
            return
        try:
            self._words = self._restricted(automaton, lost=self._lost)
        except InvalidRequest as error:
            self._error = error

    def _restricted(self, automaton: Automaton, *, lost: bool) -> Words:
        if lost and not automaton.has_failed:
            raise InvalidRequest("the answer so far does not fit the grammar", param="grammar")
        rules = self._restriction
        # One bit more than there are tokens: the one that stands for the end.
        words = np.zeros((self._vocab_size + 1 + 31) // 32, dtype=np.uint32)
        automaton.fill(words)
        may_end = bool(words[self._vocab_size >> 5] >> np.uint32(self._vocab_size & 31) & np.uint32(1))
        words[self._vocab_size >> 5] &= np.uint32((1 << (self._vocab_size & 31)) - 1)
        if may_end:
            words |= self._bits(rules.stop_token_ids)
        if rules.allowed_token_ids is not None:
            words &= self._bits(rules.allowed_token_ids)
        if rules.banned_token_ids is not None and len(rules.banned_token_ids):
            words &= ~self._bits(rules.banned_token_ids)
        if rules.forced_token_ids is not None:
            forced = words & self._bits(rules.forced_token_ids)
            words = forced if forced.any() else words
        if not words.any():
            raise InvalidRequest("the grammar and the other rules about tokens leave none that may come", param="grammar")
        return words

    def _bits(self, token_ids: Iterable[int] | _Ids) -> Words:
        words = np.zeros((self._vocab_size + 1 + 31) // 32, dtype=np.uint32)
        ids = np.fromiter(token_ids, dtype=np.int64)
        ids = ids[ids < self._vocab_size]  # a tokenizer may know tokens that the model has no logits for
        np.bitwise_or.at(words, ids >> 5, np.left_shift(np.uint32(1), (ids & 31).astype(np.uint32)))
        return words


class MaskThread:
    """Works masks out while another thread is busy elsewhere. One per runner; the thread starts with the first mask.

    An ordinary mask takes 16 us over and over again, but the first one behind a step, when weights have driven the vocabulary out
    of all caches, takes some ten times that: more than it costs to hand it over."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._count, self._seconds = 0, 0.0

    @property
    def readings(self) -> MaskReadings:
        """What it has worked out so far; from any thread."""
        return MaskReadings(self._count, self._seconds)

    def begin(self, masks: Sequence[NextMask]) -> Future[None] | None:
        """None if there is nothing to do. Until the future is done, nobody else touches the masks or their states."""
        if not masks:
            return None
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar masks")
        return self._executor.submit(self._work_out, masks)

    def _work_out(self, masks: Sequence[NextMask]) -> None:
        started_s = time.perf_counter()
        for mask in masks:
            mask.work_out()
        self._seconds += time.perf_counter() - started_s
        self._count += len(masks)


_CEILINGS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32(np.inf), np.float32(-np.inf)
).astype(np.float32)


def ceilings(words: Words, vocab_size: int) -> npt.NDArray[np.float32]:
    """What the logits may be at most, [vocab]: +inf for tokens that may come, -inf for others. A byte of the mask picks eight of
    them from a table: no branch, so that a mask with as many ones as zeros costs what any other does."""
    return np.take(_CEILINGS, words.view(np.uint8), axis=0, mode="clip").reshape(-1)[:vocab_size]
