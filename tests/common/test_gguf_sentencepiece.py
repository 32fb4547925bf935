"""SentencePiece vocabularies out of GGUF against the published algorithm: join the best-scored neighbours, leftmost first."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ModelLoadError
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>")
USER = ("\n", "\n\n", "  ", "   ", "<b>")
TEXTS = ["", " ", "the cat  sat", "   three\n\n\nlines ", "a<b>b<eos>c", "é日😀 ▁", "tthhee", " the the", "ab" * 30]


def vocabulary() -> list[tuple[str, float, int]]:
    """(piece, score, type): words of a few letters, in a random order of scores, as long as their halves are there."""
    pieces = [(token, -1000.0, CONTROL) for token in CONTROLS] + [(token, -1000.0, USER_DEFINED) for token in USER]
    pieces += [(f"<0x{value:02X}>", 0.0, BYTE) for value in range(256)]
    letters = "▁abcehst\n"
    rng = random.Random(1)
    words = set()
    for length in (2, 3, 4):
        for _ in range(60):
            words.add("".join(rng.choice(letters[:-1]) for _ in range(length)))
    words |= {"th", "the", "▁the", "▁t"}
    scores = rng.sample(range(1, 1000), len(words))
    pieces += [(word, -float(score), NORMAL) for word, score in zip(sorted(words), scores, strict=True)]
    return pieces + [(letter, -2000.0 - index, NORMAL) for index, letter in enumerate(letters[:-1])]


def write(path: Path, *, space_prefix: bool = False, drop_scores: bool = False) -> Path:
    pieces = vocabulary()
    writer = GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in pieces])
    if not drop_scores:
        writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Oracle:
    def __init__(self, pieces: list[tuple[str, float, int]]) -> None:
        self.ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
        self.scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
        alone = sorted((piece for piece, _, kind in pieces if kind in (CONTROL, USER_DEFINED)), key=len, reverse=True)
        self.alone = re.compile("|".join(map(re.escape, alone)))

    def encode(self, text: str) -> list[int]:
        found, start = [], 0
        for match in self.alone.finditer(text):
            found += [*self._joined(text[start : match.start()]), self.ids[match.group()]]
            start = match.end()
        return found + self._joined(text[start:])

    def _joined(self, text: str) -> list[int]:
        parts = list(text.replace(" ", "▁"))
        while True:
            pairs = [left + right for left, right in itertools.pairwise(parts)]
            known = [(self.scores[pair], -index) for index, pair in enumerate(pairs) if pair in self.scores]
            if not known:
                break
            index = -max(known)[1]
            parts[index : index + 2] = [pairs[index]]
        ids = []
        for part in parts:
            ids += [self.ids[part]] if part in self.ids else [self.ids[f"<0x{value:02X}>"] for value in part.encode()]
        return ids


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write(tmp_path_factory.mktemp("spm") / "tiny.gguf"))


@pytest.mark.parametrize("text", TEXTS)
def test_named_texts(spoken: Tokenizer, text: str) -> None:
    assert spoken.encode(text, add_special_tokens=False) == Oracle(vocabulary()).encode(text)


@settings(max_examples=150, deadline=None)
@given(text=st.text("abcehst <b>\néz", max_size=40))
def test_any_text(spoken: Tokenizer, text: str) -> None:
    ids = spoken.encode(text, add_special_tokens=False)
    assert ids == Oracle(vocabulary()).encode(text)
    assert spoken.decode(ids) == text
    stream = spoken.stream()
    assert "".join([stream.push(token_id) for token_id in ids]) + stream.flush() == text


def test_facts(spoken: Tokenizer) -> None:
    assert spoken.encode("a")[0] == spoken.bos_token_id == 2
    assert spoken.eos_token_ids == (1, 4)
    assert spoken.is_special(4)
    assert spoken.token_bytes(spoken.encode("é", add_special_tokens=False)[0]) == b"\xc3"


def test_a_space_is_put_first_where_the_file_says_so(tmp_path: Path) -> None:
    prefixed = Tokenizer.load(write(tmp_path / "tiny.gguf", space_prefix=True))
    ids = prefixed.encode("the cat", add_special_tokens=False)
    assert ids == Oracle(vocabulary()).encode(" the cat")
    assert prefixed.decode(ids) == "the cat"


def test_a_vocabulary_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="0 scores"):
        Tokenizer.load(write(tmp_path / "tiny.gguf", drop_scores=True))


@pytest.mark.model
def test_gemma3_270m_tokenises_as_published(gemma3: ModelFiles) -> None:
    tokenizer = Tokenizer.load(gemma3.path)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (262144, 2, (1, 106))
    assert tokenizer.encode("Hello, world!") == [2, 9259, 236764, 1902, 236888]
    text = "  naïve\n\n\n   日本語 😀 <end_of_turn> ▁"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == "<bos>" + text.replace("▁", " ")
