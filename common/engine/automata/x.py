"""xgrammar's automata, for the grammars that it reads as llguidance does; llguidance's for all others.

A mask of theirs takes less than half the time. What they are trusted with is narrow (`plain_schema.py`, and choices of texts),
for xgrammar converts much of JSON schema loosely: it ignores some keywords, and writes raw control characters where a string
has a greatest length. In any string it lets DEL pass, and bytes of lone surrogates, which reach a client as replacement
characters. Of white space it writes one form, a space behind every comma and colon, which is among those that llguidance lets
pass. An answer that was begun with it may go on with llguidance, not the other way round: workers of a model read alike.

The library is an extra (`pdserve[xgrammar]`).
"""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np

from common.engine.automata import Automaton, Compiler, Words
from common.engine.automata.plain_schema import is_plain
from common.engine.automata.tokens import GrammarTokens
from common.logs import get_logger
from common.types import Grammar, GrammarKind

SEPARATORS = (", ", ": ")
_MOST_CHARS = 16_384
_log = get_logger(__name__)


class XCompiler:
    def __init__(self, tokens: GrammarTokens, others: Compiler) -> None:
        """`others` compiles what xgrammar is not trusted with, and spells."""
        import xgrammar

        self._others = others
        self._end = tokens.eos_token_id
        special = set(tokens.special_token_ids)
        vocabulary = xgrammar.TokenizerInfo(
            [b"" if token_id in special else text for token_id, text in enumerate(tokens.tokens)],
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=len(tokens.tokens),
            stop_token_ids=[self._end],
        )
        self._library = xgrammar
        self._compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
        self._compiling = threading.Lock()

    def compile(self, grammar: Grammar) -> Automaton:
        # Whether it can be used is for llguidance to say, in limits of time and size that xgrammar does not have.
        reference = self._others.compile(grammar)
        try:
            with self._compiling:
                compiled = self._compiled(grammar)
        except RuntimeError as error:
            _log.info("llguidance reads a grammar that xgrammar does not take", reason=str(error)[:300])
            return reference
        return reference if compiled is None else XAutomaton(self._library.GrammarMatcher(compiled), self._end)

    def _compiled(self, grammar: Grammar) -> Any:
        """None if it is not for xgrammar."""
        if len(grammar.text) > _MOST_CHARS:
            return None
        if grammar.kind is GrammarKind.CHOICE:
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
            return self._compiler.compile_grammar(f"root ::= {texts}")
        if grammar.kind is GrammarKind.JSON_SCHEMA and is_plain(json.loads(grammar.text)):
            return self._compiler.compile_json_schema(
                grammar.text, any_whitespace=False, separators=SEPARATORS, strict_mode=False
            )
        return None

    def spell(self, text: str) -> list[int]:
        return self._others.spell(text)


class XAutomaton:
    def __init__(self, matcher: Any, end: int) -> None:
        self._matcher = matcher
        self._end = end

    @property
    def is_over(self) -> bool:
        if not self._matcher.is_completed():
            return False
        words = np.zeros((self._end + 1 + 31) // 32, dtype=np.uint32)
        self.fill(words)
        words[self._end >> 5] &= ~np.uint32(1 << (self._end & 31))
        return not words.any()

    @property
    def has_failed(self) -> bool:
        return False

    def copy(self) -> XAutomaton:
        return XAutomaton(self._matcher.fork(), self._end)

    def consume(self, token_ids: list[int]) -> int:
        for taken, token_id in enumerate(token_ids):
            if not self._matcher.accept_token(token_id):
                return taken
        return len(token_ids)

    def take_back(self, num_tokens: int) -> None:
        self._matcher.rollback(num_tokens)

    def fill(self, words: Words) -> None:
        self._matcher.fill_next_token_bitmask(words.view(np.int32))
