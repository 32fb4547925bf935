"""Schemas of all sorts: each is refused, or what random logits write under it is valid, by the word of `jsonschema`."""

from __future__ import annotations

import contextlib
import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from common.engine.batch import SampleSpec
from common.engine.grammar import GrammarCompiler
from common.engine.sampler import sample
from common.engine.token_rules import TokenRules
from common.errors import InvalidRequest
from common.grammar.examiner import byte_vocabulary, examine
from common.tokenizer import Tokenizer
from common.types import Grammar, GrammarKind, Request, SamplingParams
from support.json_schemas import HOSTILE, USUAL, WRONG
from support.tiny_models import make_tiny_tokenizer

VOCAB = 400  # more than the tokenizer has, as models do
END = 2
CLOSING = b'"}],:0123456789eaxlstrun'
VOCABULARY = byte_vocabulary()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": END}))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB)


def write(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, seed: int, most: int = 120, favoured: bytes = CLOSING
) -> tuple[bytes, bool]:
    """What random logits write, and whether it came to an end. Closing characters are likelier, so that many do."""
    sampling = SamplingParams(max_tokens=most, seed=seed, temperature=0.0, stop_token_ids=(END,), grammar=grammar)
    request = Request("r", "m", (5,), sampling)
    rules = TokenRules.of(request, compiler.compile(grammar))
    assert rules is not None
    generator = torch.Generator().manual_seed(seed)
    favour = torch.zeros(VOCAB)
    favour[[tokenizer.encode(chr(byte), add_special_tokens=False)[0] for byte in favoured]] = 2.0 if favoured is CLOSING else 50.0
    favour[END] = 3.0
    tokens = [5]
    while len(tokens) <= most:
        logits = torch.randn(1, VOCAB, generator=generator) * 2 + favour
        spec = SampleSpec.for_next_token(request.sampling, choice=0, position=len(tokens), rules=rules.for_next(tokens))
        token_id = sample(logits, [spec], [0])[0].token_id
        if token_id == END:
            return text_of(tokenizer, tokens), True
        tokens.append(token_id)
        if rules.is_over(tokens):
            return text_of(tokenizer, tokens), True
    return text_of(tokenizer, tokens), False


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> bytes:
    assert not any(tokenizer.is_special(token_id) for token_id in tokens[1:])
    return b"".join(map(tokenizer.token_bytes, tokens[1:]))


def schema_grammar(schema: Any) -> Grammar:
    return examine(VOCABULARY, GrammarKind.JSON_SCHEMA, json.dumps(schema))


def test_the_corpus_is_large() -> None:
    assert len(USUAL) + len(WRONG) + len(HOSTILE) >= 130


def test_what_is_written_is_valid(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    ended_names = set()
    for name, schema in USUAL.items():
        grammar = schema_grammar(schema)
        for seed in range(2):
            text, ended = write(compiler, tokenizer, grammar, seed)
            if ended:
                assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)), (name, text)
                assert text == text.strip()
                ended_names.add(name)
    assert len(ended_names) > 0.85 * len(USUAL), "random logits come to no end: this says little"


def test_a_model_that_likes_white_space_comes_to_an_end_as_well(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    text, ended = write(compiler, tokenizer, schema_grammar(schema), 0, favoured=b" \n\t\r")
    assert ended
    assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    assert text.count(b" ") + text.count(b"\t") > 10, "there was no white space to be had: this says little"


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_kept_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        schema_grammar(WRONG[name])
    assert 10 < len(raised.value.message) < 400


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_refused_or_kept(compiler: GrammarCompiler, tokenizer: Tokenizer, name: str) -> None:
    schema = HOSTILE[name]
    ended = False
    with contextlib.suppress(InvalidRequest):
        text, ended = write(compiler, tokenizer, schema_grammar(schema), 0, most=40)
    if ended:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


REGEXES = [
    r"[a-z]{3,8}", r"(yes|no)",
    r"\d{3}-\d{4}", r"a*b+c?", r"[^a-z]{5}", r"(ab|cd){2,4}", r"é+|ü", r"x{0,3}y", r"[a-zA-Z]+ [a-z]{2,}", r".{1,9}",
    r"[a-z.]+@[a-z.]{2,9}\.(com|org)", r"(?:(?:25[0-5]|1?[0-9]{1,2})\.){3}[0-9]", r"[A-F0-9]{2}(:[A-F0-9]{2}){5}",
]  # fmt: skip


@pytest.mark.parametrize("regex", REGEXES)
def test_regular_expressions_match_as_a_whole(compiler: GrammarCompiler, tokenizer: Tokenizer, regex: str) -> None:
    grammar = examine(VOCABULARY, GrammarKind.REGEX, regex)
    written = [write(compiler, tokenizer, grammar, seed) for seed in range(4)]
    assert any(ended for _, ended in written)
    for text, ended in written:
        if ended:
            assert re.fullmatch(regex, text.decode())


@pytest.mark.parametrize("regex", ["(", "a(?=b)", r"(a)\1", "[z-a]", "(" * 2000 + "a" + ")" * 2000, "[^\\x00-\\U0010FFFF]"])
def test_wrong_regular_expressions_are_refused(regex: str) -> None:
    with pytest.raises(InvalidRequest):
        examine(VOCABULARY, GrammarKind.REGEX, regex)


def test_choices_are_all_there_is(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    generator = random.Random(4)
    alphabet = 'ab"\\\n\té世🌍 {}|/'
    choices = sorted({"".join(generator.choices(alphabet, k=generator.randrange(1, 9))) for _ in range(200)})
    grammar = examine(VOCABULARY, GrammarKind.CHOICE, json.dumps(choices, ensure_ascii=False))
    written = {write(compiler, tokenizer, grammar, seed) for seed in range(60)}
    assert all(ended and text.decode() in choices for text, ended in written)
    assert len(written) > 20


BALANCED_LARK = 'start: pair+\npair: "(" pair* ")" | "[" pair* "]"'
BALANCED_GBNF = 'root ::= pair+\npair ::= "(" pair* ")" | "[" pair* "]"'


@pytest.mark.parametrize("text", [BALANCED_LARK, BALANCED_GBNF])
def test_grammars_in_both_notations(compiler: GrammarCompiler, tokenizer: Tokenizer, text: str) -> None:
    grammar = examine(VOCABULARY, "grammar", text)
    ended = [written for written, ended in (write(compiler, tokenizer, grammar, seed) for seed in range(8)) if ended]
    assert ended
    for written in ended:
        left = written.decode()
        while left != (left := left.replace("()", "").replace("[]", "")):
            pass
        assert left == ""


@pytest.mark.parametrize(
    "text", ['start: "a', "root ::= missing", "nonsense", "(" * 5000, 'start: a\na: a "x"', "start: <|im_end|>"]
)
def test_wrong_grammars_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        examine(VOCABULARY, "grammar", text)


def test_masks_do_not_depend_on_how_the_tokens_came(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """One by one, all at once, with guesses that are taken back, while a mask is still to be worked out: the same mask."""
    grammar = schema_grammar(USUAL["invoice"])
    text, _ = write(compiler, tokenizer, grammar, 3)
    tokens = [5, *tokenizer.encode(text.decode("utf-8", errors="ignore"), add_special_tokens=False)]
    request = Request("r", "m", (5,), SamplingParams(max_tokens=500, seed=1, stop_token_ids=(END,), grammar=grammar))

    def rules() -> TokenRules:
        found = TokenRules.of(request, compiler.compile(grammar))
        assert found is not None
        return found

    def mask(of: TokenRules, known: list[int]) -> Any:
        found = of.for_next(known)
        assert found is not None
        assert found.mask is not None
        return found.mask

    one_by_one = rules()
    reference = [mask(one_by_one, tokens[:end]).words.copy() for end in range(1, len(tokens))]
    guessing, late = rules(), rules()
    pending = []
    generator = random.Random(1)
    for end in range(1, len(tokens)):
        assert np.array_equal(mask(rules(), tokens[:end]).words, reference[end - 1])
        wrong = [*tokens[:end], *generator.choices(range(3, 380), k=generator.randrange(4))]
        for place in range(end, len(wrong) + 1):
            guessing.for_next(wrong[:place])
        guessing.rewind(end - generator.randrange(2))
        assert np.array_equal(mask(guessing, tokens[:end]).words, reference[end - 1])
        pending.append(mask(late, tokens[:end]))
    assert all(np.array_equal(item.words, words) for item, words in zip(pending, reference, strict=True))
