"""A process that says whether grammars compile: `python -m common.grammar.examiner`.

    stdin    one JSON object a line: {"kind", "text"}
    stdout   one JSON object a line, in the same order: {"text"} (what to compile from now on) or {"error"}

It exists to be killed. Whoever feeds it (`router.structured.examination`) gives each grammar a time and ends the process when
that is over; memory is bounded as well. A grammar that takes the compiler down takes this process and nothing else.

It knows no model: its vocabulary is one token per byte, which decides everything but how much work a real vocabulary makes. Kind
"grammar" is Lark or GBNF, which is translated to Lark here.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from common.errors import InvalidRequest
from common.grammar.compiling import check, compile_grammar
from common.types import Grammar, GrammarKind

ANY_GRAMMAR = "grammar"  # a kind beside those of GrammarKind: Lark or GBNF, whichever it looks like
_MEMORY_BYTES = 1024 * 1024 * 1024
_END = 256
_WALK_BYTES = 48


class _Bytes:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    eos_token_id = _END
    bos_token_id = None
    special_token_ids: Sequence[int] = (_END,)
    tokens: Sequence[bytes] = (*(bytes([value]) for value in range(_END)), b"<end>")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def byte_vocabulary() -> LLTokenizer:
    return LLTokenizer(_Bytes())  # type: ignore[arg-type]  # duck-typed on the other side


def examine(vocabulary: LLTokenizer, kind: str, text: str) -> Grammar:
    """The grammar as workers are to compile it. Raises InvalidRequest."""
    if kind == ANY_GRAMMAR:
        kind, text = GrammarKind.LARK, _lark(text)
    grammar = Grammar(GrammarKind(kind), text)
    _walk(compile_grammar(vocabulary, grammar))
    return grammar


def _walk(matcher: LLMatcher) -> None:
    """Some steps into the grammar, always the same: many a grammar compiles easily and is too much work at its first fork."""
    chosen = random.Random(0)
    for _ in range(_WALK_BYTES):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        check(matcher)
        allowed = [byte for byte in range(_END) if mask >> byte & 1]
        if not allowed:
            return
        matcher.consume_token(chosen.choice(allowed))
        check(matcher)


def _lark(text: str) -> str:
    try:
        return any_to_lark(text)
    except Exception as error:  # the library raises bare Exception for several mistakes
        raise InvalidRequest(f"the grammar cannot be used: {str(error)[:300]}", param="grammar") from error


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    vocabulary = byte_vocabulary()
    sys.stdout.write("{}\n")  # ready
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"text": examine(vocabulary, asked["kind"], asked["text"]).text}
        except InvalidRequest as error:
            answer = {"error": error.message}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
