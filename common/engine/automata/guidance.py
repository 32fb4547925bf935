"""llguidance's automata (`common.grammar.compiling`): every kind of grammar, with limits on the work of each step."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from common.engine.automata import Words
from common.engine.automata.tokens import GrammarTokens
from common.grammar.compiling import check, compile_grammar
from common.types import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class GuidanceCompiler:
    def __init__(self, tokens: GrammarTokens) -> None:
        self._tokens = tokens
        self._vocabulary: LLTokenizer | None = None
        self._building = threading.Lock()

    def compile(self, grammar: Grammar) -> GuidanceAutomaton:
        return GuidanceAutomaton(compile_grammar(self._all_tokens(), grammar))

    def spell(self, text: str) -> list[int]:
        return list(self._all_tokens().tokenize_str(text))

    def _all_tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._building:  # takes a fifth of a second, so only models that are asked for grammars have one
            if self._vocabulary is None:
                self._vocabulary = LLTokenizer(self._tokens)  # type: ignore[arg-type]  # duck-typed on the other side
            return self._vocabulary


class GuidanceAutomaton:
    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def has_failed(self) -> bool:
        return self._matcher.is_error()

    def copy(self) -> GuidanceAutomaton:
        return GuidanceAutomaton(self._matcher.deep_copy())

    def consume(self, token_ids: list[int]) -> int:
        return self._matcher.try_consume_tokens(token_ids)

    def take_back(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)

    def fill(self, words: Words) -> None:
        check(self._matcher)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        check(self._matcher)
