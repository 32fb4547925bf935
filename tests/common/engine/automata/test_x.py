"""xgrammar behind the seam, held against llguidance mask by mask, and against `jsonschema` by what it lets be written."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jsonschema
import numpy as np
import pytest

from common.engine.automata import Automaton, require
from common.engine.automata.guidance import GuidanceAutomaton, GuidanceCompiler
from common.engine.automata.plain_schema import is_plain
from common.engine.automata.tokens import GrammarTokens
from common.engine.grammar import GrammarCompiler, Restriction
from common.errors import InvalidRequest, StartupError
from common.grammar.notation import JSON_OPTIONS
from common.tokenizer import Tokenizer
from common.types import Grammar, GrammarKind
from support.json_schemas import HOSTILE, USUAL, WRONG
from support.tiny_models import make_tiny_tokenizer

pytest.importorskip("xgrammar")
from common.engine.automata.x import SEPARATORS, XAutomaton, XCompiler

END = 256
PLAIN = {name: schema for name, schema in USUAL.items() if is_plain(schema)}
# White space as xgrammar writes it, so that what is left to differ is everything else.
OPTIONS: dict[str, Any] = {name: value for name, value in JSON_OPTIONS.items() if name != "whitespace_pattern"}
OPTIONS |= {"item_separator": SEPARATORS[0], "key_separator": SEPARATORS[1], "whitespace_flexible": False}
DELETE = 0x7F
CHOICES = ["a", "ab", 'quote " \\', "Grüße 🌍", "\n\t", ""]


class Bytes:
    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = END
    special_token_ids: Sequence[int] = (END,)
    tokens: Sequence[bytes] = (*(bytes([value]) for value in range(END)), b"<end>")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


TOKENS = cast(GrammarTokens, Bytes())


@pytest.fixture(scope="module")
def guidance() -> GuidanceCompiler:
    return GuidanceCompiler(TOKENS)


@pytest.fixture(scope="module")
def compiler(guidance: GuidanceCompiler) -> XCompiler:
    return XCompiler(TOKENS, guidance)


def allowed(automaton: Automaton) -> list[int]:
    words = np.zeros((END + 1 + 31) // 32, dtype=np.uint32)
    automaton.fill(words)
    return [token for token in range(END + 1) if words[token >> 5] >> np.uint32(token & 31) & np.uint32(1)]


def json_schema(schema: object, options: dict[str, Any] | None = None) -> Grammar:
    more = {} if options is None else {"x-guidance": options}
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps({**cast(dict[str, Any], schema), **more}))


def chosen(generator: random.Random, tokens: list[int]) -> int:
    closing = [token for token in tokens if token < END and token in b'"}],:0123456789eaxlstrun']
    return generator.choice(closing if closing and generator.random() < 0.8 else tokens)


@pytest.mark.parametrize("name", PLAIN)
def test_masks_are_those_of_llguidance(compiler: XCompiler, guidance: GuidanceCompiler, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("common.grammar.compiling.JSON_OPTIONS", OPTIONS)
    ours, theirs = compiler.compile(json_schema(PLAIN[name])), guidance.compile(json_schema(PLAIN[name]))
    assert isinstance(ours, XAutomaton)
    compare(ours, theirs)


def test_masks_of_choices_are_those_of_llguidance(compiler: XCompiler, guidance: GuidanceCompiler) -> None:
    grammar = Grammar(GrammarKind.CHOICE, json.dumps(CHOICES))
    ours = compiler.compile(grammar)
    assert isinstance(ours, XAutomaton)
    compare(ours, guidance.compile(grammar))


def strictly(tokens: list[int], text: bytes) -> set[int]:
    """Without what one of the two lets pass and the other does not: DEL and surrogates in texts, minus zero, and a second way to
    escape what a constant has to escape."""
    found = set(tokens) - {DELETE}
    if text.endswith(b"\xed"):
        found -= set(range(0xA0, 0xC0))
    if text.endswith(b"-"):
        found.discard(ord("0"))
    if text.endswith(b"\\"):
        found.discard(ord("u"))
    return found


def compare(ours: Automaton, theirs: Automaton) -> None:
    for seed in range(2):
        generator, one, other, text = random.Random(seed), ours.copy(), theirs.copy(), b""
        for _ in range(60):
            left, right = (strictly(allowed(automaton), text) for automaton in (one, other))
            assert left == right, (seed, text)
            assert one.is_over == other.is_over
            if one.is_over:
                break
            token = chosen(generator, sorted(left))
            if token == END:
                break
            assert one.consume([token]) == other.consume([token]) == 1
            text += bytes([token])


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_written_is_valid_and_fits_llguidance_as_it_serves(
    compiler: XCompiler, guidance: GuidanceCompiler, name: str
) -> None:
    automaton, production = compiler.compile(json_schema(PLAIN[name])), guidance.compile(json_schema(PLAIN[name]))
    for seed in range(2):
        generator, writing, text = random.Random(seed), automaton.copy(), b""
        while not writing.is_over and len(text) < 400:
            token = chosen(generator, sorted(strictly(allowed(writing), text)))
            if token == END:
                break
            assert writing.consume([token]) == 1
            text += bytes([token])
        else:
            if not writing.is_over:
                continue  # a tree that goes on growing
        assert jsonschema.Draft202012Validator(PLAIN[name]).is_valid(json.loads(text)), text
        reading = production.copy()
        assert reading.consume(list(text)) == len(text), text
        assert reading.is_over or END in allowed(reading)


def test_what_xgrammar_reads_otherwise_is_left_to_llguidance(compiler: XCompiler) -> None:
    assert len(PLAIN) > 25
    for name in ("short string", "pattern with quotes", "all of", "required but not described", "bounded number", "open object"):
        assert isinstance(compiler.compile(json_schema(USUAL[name])), GuidanceAutomaton), name
    for schema in ({"type": "array", "items": {"type": "null"}, "maxItems": 10**6}, True, {"$ref": "https://x/y"}, {}):
        assert not is_plain(schema)
    assert isinstance(compiler.compile(Grammar(GrammarKind.REGEX, "[a-z]+")), GuidanceAutomaton)


def test_what_llguidance_refuses_is_refused(compiler: XCompiler, guidance: GuidanceCompiler) -> None:
    plain = {name: schema for name, schema in {**WRONG, **HOSTILE}.items() if is_plain(schema)}
    refused = []
    for name, schema in plain.items():
        try:
            guidance.compile(json_schema(schema))
        except InvalidRequest:
            refused.append(name)
            with pytest.raises(InvalidRequest):
                compiler.compile(json_schema(schema))
        else:
            assert allowed(compiler.compile(json_schema(schema)))
    assert refused
    assert len(refused) < len(plain)


def test_large_objects_are_left_to_llguidance(compiler: XCompiler) -> None:
    """With a thousand properties that may be left out xgrammar compiles for many seconds."""
    assert isinstance(compiler.compile(json_schema(HOSTILE["1000 properties"])), GuidanceAutomaton)


def test_tokens_that_were_taken_back_leave_nothing_behind(compiler: XCompiler) -> None:
    automaton = compiler.compile(json_schema(PLAIN["array of objects"]))
    generator, text = random.Random(5), list(b'[{"id": 17, "ok": true}, {"id": 4, "ok": false}]')
    for end in range(len(text)):
        plain, guessing = automaton.copy(), automaton.copy()
        assert plain.consume(text[:end]) == end
        guess = [*text[:end], *generator.choices(range(END), k=3)]
        taken = guessing.consume(guess)
        assert taken >= end
        guessing.take_back(taken - end)
        assert allowed(guessing) == allowed(plain)
        assert guessing.copy().consume(text[end:]) == len(text) - end
    finished = automaton.copy()
    assert finished.consume(text) == len(text)
    assert finished.is_over


def test_a_choice_has_the_same_masks_whatever_came_in_between(tmp_path: Path) -> None:
    """Over tokens of several bytes, as an engine uses it: with guesses, masks that are worked out late, and the end."""
    make_tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    tokenizer = Tokenizer.load(tmp_path)
    compiled = GrammarCompiler(tokenizer, 400, "xgrammar").compile(json_schema(PLAIN["person"]))
    answer = tokenizer.encode('{"name": "Anna", "age": 42}', add_special_tokens=False)
    rules = Restriction(stop_token_ids=(2,))
    plain, guessing = compiled.start(), compiled.start()
    pending = []
    for known, token in enumerate(answer):
        mask = plain.next_mask(rules, num_certain=known)
        assert mask is not None
        assert mask.allow(token)
        guessing.consume([4, 5, 6])  # no beginning of this sentence
        guessing.rewind(known)
        late = guessing.next_mask(rules, num_certain=known)
        assert late is not None
        pending.append((mask.words.copy(), late))
        plain.consume([token])
        guessing.consume([token])
    assert plain.is_over
    assert guessing.is_over
    assert all(np.array_equal(words, late.words) for words, late in pending)


def test_a_reader_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.engine.automata.find_spec", lambda name: None)
    with pytest.raises(StartupError, match=r"pdserve\[xgrammar\]") as raised:
        require("xgrammar")
    assert raised.value.param == "engine.grammars"
