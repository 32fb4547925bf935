"""From a `Grammar` to an automaton over the tokens of a vocabulary. The automata are llguidance's.

    matcher = compile_grammar(vocabulary, grammar)    InvalidRequest if it is wrong, not supported, too large, or matches nothing

Limits bound the work of compiling and of each step, and the memory; a grammar that runs into one while it is used puts its
matcher into an error state. White space in JSON is limited, so that no answer is an endless blank: between two parts there may be
nothing, one space, or a line break with some indentation, and nothing stands before or after the whole.

llguidance is loaded with the first grammar. It knows neither models nor tokenizers of ours.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from common.errors import InvalidRequest
from common.grammar.notation import JSON_OPTIONS, lark_string
from common.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_MAX_MESSAGE_CHARS = 300


def compile_grammar(vocabulary: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the beginning of the answer. May take a second; other Python threads run meanwhile."""
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary, source_of(grammar), log_level=0, limits=_limits())
    check(matcher)
    mask = matcher.compute_bitmask()
    check(matcher)
    if not any(mask):
        raise InvalidRequest("no text matches the grammar", param="grammar")
    return matcher


def source_of(grammar: Grammar) -> str:
    """The grammar in llguidance's own notation. Raises InvalidRequest for what is not even well-formed."""
    from llguidance import LLMatcher

    try:
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                # A client's own "x-guidance" is overruled.
                return LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
            case GrammarKind.REGEX:
                return LLMatcher.grammar_from_regex(grammar.text)
            case GrammarKind.CHOICE:
                return LLMatcher.grammar_from_lark("start: " + " | ".join(map(lark_string, json.loads(grammar.text))))
            case GrammarKind.LARK:
                return LLMatcher.grammar_from_lark(grammar.text)
    except ValueError as error:
        raise InvalidRequest(_readable(str(error)), param="grammar") from error


def check(matcher: LLMatcher) -> None:
    """Raises InvalidRequest if the matcher can go no further."""
    if matcher.is_error():
        raise InvalidRequest(_readable(matcher.get_error()), param="grammar")


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    # Steps are paid for by all who share the batch, states by the worker's memory; what is not given here bounds compiling.
    return LLParserLimits(step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=16_000, verbose_errors=False)


def _readable(message: str) -> str:
    first = message.replace("<non-verbose/>", "").split("<state>")[0].strip()
    if first.startswith("NoExtension"):
        return "no text matches the grammar"
    return f"the grammar cannot be used: {first[:_MAX_MESSAGE_CHARS]}"
