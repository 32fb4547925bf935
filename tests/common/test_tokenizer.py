from __future__ import annotations

import itertools
import json
import random
import re
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from transformers import AutoTokenizer

from common.errors import InvalidRequest, ModelLoadError
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer
from support.tiny_gguf import make_tiny_gguf
from support.tiny_models import CHAT_TEMPLATE, make_tiny_model, make_tiny_tokenizer

CORPUS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "tabs\tand\nnewlines\r\n\r\n\n  mixed \t \n",
    "don't we'll I'm THEY'RE it's 'quoted'",
    "naïve café Größe Ångström",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "😀👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200b zero\u00a0width",
    "مرحبا بالعالم שלום עולם",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}  # comment\n",
    '<html><body class="a">&amp;</body></html>',
    "a" * 300,
    "x = y\n\n\n\n\n        deep   indent",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|im_end|> <|im_ end|> <|im_end",
]
DIGITS = ["1234567890", "in 2024, 3.14159 and -1e10", "v1.2.3-rc4", "½ ² ٣٤ Ⅷ 一二三", "a1b22c333 0x1F", "1 2  3"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.load(tiny_folder)


@pytest.fixture(scope="module")
def spaced() -> Tokenizer:
    """A vocabulary as SentencePiece makes it: words begin with a space mark, unknown characters fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *"abcdefghij", "▁a", "▁b", "bc"]
    merges = [("▁", "a"), ("▁", "b"), ("b", "c")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return Tokenizer(backend, eos_token_ids=(2,), bos_token_id=1, context_tokens=None, digest="", chat_template=None)


def _streamed(tokenizer: Tokenizer, ids: list[int], **kwargs: Any) -> str:
    stream = tokenizer.stream(**kwargs)
    return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()


# -- Hugging Face folders ----------------------------------------------------------------------------------------------------


def test_folder_agrees_with_transformers(tiny_folder: Path, tiny: Tokenizer) -> None:
    oracle = AutoTokenizer.from_pretrained(tiny_folder)
    for text in CORPUS + DIGITS:
        ids = oracle(text).input_ids
        assert tiny.encode(text) == ids
        assert tiny.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tiny.decode(ids, skip_special_tokens=False) == text
    messages = [{"role": "user", "content": "the time?"}]
    assert tiny.chat_template is not None
    assert tiny.chat_template.render(messages) == oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_folder_facts(tiny: Tokenizer) -> None:
    assert (tiny.vocab_size, tiny.bos_token_id, tiny.eos_token_ids, tiny.context_tokens) == (384, 0, (2,), 2048)
    assert tiny.is_special(2)
    assert not tiny.is_special(3)
    assert not tiny.is_special(10**6)


@pytest.mark.parametrize(
    ("generation", "config", "eos_token", "expected"),
    [
        (None, None, None, ()),
        (None, 1, None, (1,)),
        (2, 1, None, (2,)),
        ([2, 0], 1, None, (2, 0)),
        ([0], None, "<|im_end|>", (0, 2)),
        ([2, 0], None, "<|im_end|>", (2, 0)),
        (None, None, {"content": "<|im_end|>", "lstrip": False}, (2,)),
    ],
)
def test_end_tokens(tmp_path: Path, generation: Any, config: Any, eos_token: Any, expected: tuple[int, ...]) -> None:
    make_tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({} if generation is None else {"eos_token_id": generation}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    assert Tokenizer.load(tmp_path).eos_token_ids == expected


def test_chat_template_sources(tmp_path: Path) -> None:
    make_tiny_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default {{ bos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named, "bos_token": "<|endoftext|>"}))
    template = Tokenizer.load(tmp_path).chat_template
    assert template is not None
    assert template.render([]) == "default <|endoftext|>"
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    template = Tokenizer.load(tmp_path).chat_template
    assert template is not None
    assert template.render([]) == "from its own file"


def test_truncation_left_in_the_file_is_ignored(tmp_path: Path) -> None:
    backend = make_tiny_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("0123456789")) == 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("config.json", "[]"),
        ("tokenizer_config.json", "no json"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}'),
    ],
)
def test_broken_folders_are_load_errors(tmp_path: Path, name: str, content: str | None) -> None:
    make_tiny_model(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelLoadError):
        Tokenizer.load(tmp_path)


def test_digest_tells_tokenizers_apart(tmp_path: Path) -> None:
    first, again = make_tiny_model(tmp_path / "a", seed=0), make_tiny_model(tmp_path / "b", seed=1)
    other = make_tiny_model(tmp_path / "c", vocab=300)
    assert Tokenizer.load(first).digest == Tokenizer.load(again).digest != Tokenizer.load(other).digest
    plain = make_tiny_gguf(first, tmp_path / "plain.gguf")
    copy = make_tiny_gguf(first, tmp_path / "copy.gguf")
    digits = make_tiny_gguf(first, tmp_path / "digits.gguf", pre="smollm")
    assert Tokenizer.load(plain).digest == Tokenizer.load(copy).digest != Tokenizer.load(digits).digest


# -- special tokens and odd input --------------------------------------------------------------------------------------------


def test_special_tokens_in_text_are_recognised_unless_forbidden(tiny: Tokenizer) -> None:
    assert tiny.encode("a<|im_end|>") == [tiny.encode("a")[0], 2]
    literal = tiny.encode("a<|im_end|>", allow_special=False)
    assert 2 not in literal
    assert tiny.decode(literal) == "a<|im_end|>"


def test_half_a_surrogate_pair_is_an_invalid_request(tiny: Tokenizer) -> None:
    with pytest.raises(InvalidRequest):
        tiny.encode("\ud83d")


def test_ids_outside_the_vocabulary_are_empty(tiny: Tokenizer) -> None:
    outside = tiny.vocab_size + 5
    assert tiny.token_bytes(outside) == b""
    assert tiny.token_text(outside) == ""
    assert tiny.decode([outside, tiny.encode("a")[0]]) == "a"
    assert _streamed(tiny, [outside, tiny.encode("a")[0]]) == "a"


# -- bytes of tokens ---------------------------------------------------------------------------------------------------------


@given(st.text())
def test_bytes_of_tokens_spell_the_text(text: str) -> None:
    tokenizer = _TINY
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text)) == text.encode()


def test_bytes_of_every_token_agree_with_the_library(tiny: Tokenizer) -> None:
    for token_id in range(tiny.vocab_size):
        assert tiny.token_bytes(token_id).decode("utf-8", errors="replace") == tiny.token_text(token_id)


def test_bytes_of_spaced_tokens(spaced: Tokenizer) -> None:
    assert spaced.token_bytes(3 + 0xE2) == b"\xe2"
    assert spaced.token_bytes(spaced._backend.token_to_id("▁a")) == b" a"
    assert spaced.token_bytes(2) == b"</s>"


# -- streams -----------------------------------------------------------------------------------------------------------------

_TINY = Tokenizer(
    make_tiny_tokenizer(), eos_token_ids=(2,), bos_token_id=None, context_tokens=None, digest="", chat_template=None
)


@given(st.lists(st.integers(0, 390), max_size=60), st.booleans())
@settings(max_examples=200)
def test_stream_of_any_ids_is_their_decoding(ids: list[int], skip: bool) -> None:
    assert _streamed(_TINY, ids, skip_special_tokens=skip) == _TINY.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=40))
@settings(max_examples=200)
def test_stream_of_text_is_the_text_and_never_runs_ahead(text: str) -> None:
    ids, stream, out = _TINY.encode(text, allow_special=False), _TINY.stream(), ""
    for count, token_id in enumerate(ids, start=1):
        out += stream.push(token_id)
        spelled = b"".join(_TINY.token_bytes(each) for each in ids[:count])
        assert out == spelled.decode("utf-8", errors="ignore")  # every whole character is out, no part of one is
    assert out + stream.flush() == text


@pytest.mark.parametrize("byte_level", [True, False])
@given(ids=st.lists(st.integers(0, 275), max_size=40), cuts=st.lists(st.integers(0, 40), max_size=4))
@settings(max_examples=200)
def test_many_ids_at_once_are_as_one_by_one(spaced: Tokenizer, byte_level: bool, ids: list[int], cuts: list[int]) -> None:
    tokenizer = _TINY if byte_level else spaced
    bounds = [0, *sorted(cuts), len(ids)]
    singly, together = tokenizer.stream(), tokenizer.stream()
    for start, end in itertools.pairwise(bounds):
        expected = "".join([singly.push(token_id) for token_id in ids[start:end]])
        assert together.push_all(ids[start:end]) == expected
    assert together.flush() == singly.flush()


@example(prompt="é日😀", reply=" ")
@example(prompt="日" * 30, reply=" a b")
@given(prompt=st.text("abc 日é😀", max_size=12), reply=st.text("abc 日é😀", min_size=1, max_size=20))
@settings(max_examples=200)
def test_spaced_stream_continues_its_prompt(spaced: Tokenizer, prompt: str, reply: str) -> None:
    prompt_ids = spaced.encode("a" + prompt)
    reply_ids = spaced.encode("a" + prompt + reply)[len(prompt_ids) :]
    if spaced.encode("a" + prompt + reply)[: len(prompt_ids)] != prompt_ids:
        return  # the merge across the seam belongs to neither
    assert _streamed(spaced, reply_ids, prompt_ids=prompt_ids) == reply


@given(st.lists(st.integers(0, 275), max_size=40), st.lists(st.integers(0, 275), max_size=6))
@settings(max_examples=200)
def test_spaced_stream_survives_any_ids(spaced: Tokenizer, ids: list[int], prompt_ids: list[int]) -> None:
    text = _streamed(spaced, ids, prompt_ids=prompt_ids)
    spelled = "".join(spaced.token_text(token_id) for token_id in ids if token_id >= 259)  # all but specials and bytes
    assert len(re.findall("[a-z]", text)) >= len(re.findall("[a-z]", spelled))


def test_broken_bytes_are_held_for_a_while_only(spaced: Tokenizer) -> None:
    stream = spaced.stream(prompt_ids=spaced.encode("a"))
    pushed = [stream.push(3 + 0xFF) for _ in range(100)]
    assert "".join(pushed).count("\ufffd") >= 80
    assert "".join(stream.push(token_id) for token_id in spaced.encode("bc")).endswith("bc")


def test_a_prompt_that_ends_inside_a_character_is_not_repeated(spaced: Tokenizer) -> None:
    prompt_ids = [*spaced.encode("abc"), 3 + 0xF0, 3 + 0x9F]
    assert "b" not in _streamed(spaced, spaced.encode("a"), prompt_ids=prompt_ids)


def test_many_threads_share_one_tokenizer(tiny: Tokenizer) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        chooser = random.Random(seed)
        for _ in range(50):
            text = "".join(chooser.choices("the of 日😀é\n", k=30))
            if tiny.decode(tiny.encode(text)) != text or _streamed(tiny, tiny.encode(text, allow_special=False)) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- GGUF --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [None, "default", "gpt-2", "llama-bpe", "qwen2"])
def test_gguf_agrees_with_transformers(tiny_folder: Path, tmp_path: Path, pre: str | None) -> None:
    path = make_tiny_gguf(tiny_folder, tmp_path / "model.gguf", pre=pre)
    oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = Tokenizer.load(path)
    for text in CORPUS + DIGITS:
        if pre == "qwen2":
            text = unicodedata.normalize("NFC", text)
        assert ours.encode(text, add_special_tokens=False) == oracle(text, add_special_tokens=False).input_ids, text


def test_qwen2_normalises(tiny_folder: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(make_tiny_gguf(tiny_folder, tmp_path / "model.gguf", pre="qwen2"))
    assert ours.encode("e\u0301") == ours.encode("\u00e9") != Tokenizer.load(tiny_folder).encode("e\u0301")


def test_llama_takes_a_word_that_is_a_token_without_merging(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].remove(["Ġt", "h"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    merging = Tokenizer.load(make_tiny_gguf(folder, tmp_path / "gpt2.gguf", pre="gpt-2"))
    taking = Tokenizer.load(make_tiny_gguf(folder, tmp_path / "llama.gguf", pre="llama-bpe"))
    assert [merging.token_text(token_id) for token_id in merging.encode(" the")] == [" t", "h", "e"]
    assert [taking.token_text(token_id) for token_id in taking.encode(" the")] == [" the"]


def test_gguf_facts(tiny_folder: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(make_tiny_gguf(tiny_folder, tmp_path / "model.gguf"))
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids, ours.context_tokens) == (384, 0, (2, 0), 2048)
    assert ours.chat_template is not None
    assert ours.chat_template.source == CHAT_TEMPLATE
    assert ours.encode("<|im_start|>a") == [1, *ours.encode("a")]


def test_gguf_adds_bos_if_its_flag_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    ours = Tokenizer.load(make_tiny_gguf(tiny_folder, tmp_path / "model.gguf", add_bos=True))
    plain = ours.encode("the time", add_special_tokens=False)
    assert ours.encode("the time") == [0, *plain]
    assert plain[0] != 0


@pytest.mark.parametrize(("arguments", "named"), [({"pre": "tekken"}, "tekken"), ({"tokenizer_model": "bert"}, "'bert'")])
def test_unknown_gguf_tokenizers_are_refused_by_name(
    tiny_folder: Path, tmp_path: Path, arguments: dict[str, str], named: str
) -> None:
    path = make_tiny_gguf(tiny_folder, tmp_path / "model.gguf", **arguments)
    with pytest.raises(ModelLoadError, match=named):
        Tokenizer.load(path)


def test_files_that_are_no_gguf_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    whole = make_tiny_gguf(tiny_folder, tmp_path / "model.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"no model at all", whole[:1000], whole[: len(whole) // 2], b"GGML" + whole[4:]):
        broken.write_bytes(content)
        with pytest.raises(ModelLoadError):
            Tokenizer.load(broken)
    with pytest.raises(ModelLoadError, match="pdserve pull"):
        Tokenizer.load(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: ModelFiles) -> Tokenizer:
    return Tokenizer.load(smollm2.path)


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2: ModelFiles) -> Any:
    return AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)


@pytest.mark.model
def test_smollm2_agrees_with_transformers(smollm2_tokenizer: Tokenizer, smollm2_oracle: Any) -> None:
    for text in CORPUS:
        assert smollm2_tokenizer.encode(text) == smollm2_oracle(text).input_ids, text
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.model
def test_smollm2_digits_stand_alone(smollm2_tokenizer: Tokenizer, smollm2_oracle: Any) -> None:
    """Transformers does not know this model's rule for digits: it is applied to the text before its tokenizer sees it."""
    for text in DIGITS:
        pieces: list[str] = []
        for character in text:
            numeric = unicodedata.category(character).startswith("N")
            if pieces and not numeric and not unicodedata.category(pieces[-1][-1]).startswith("N"):
                pieces[-1] += character
            else:
                pieces.append(character)
        assert smollm2_tokenizer.encode(text) == [token_id for piece in pieces for token_id in smollm2_oracle(piece).input_ids], (
            text
        )


@pytest.mark.model
def test_smollm2_facts(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.eos_token_ids == (2, 0)  # <|im_end|> and <|endoftext|>
    assert (smollm2_tokenizer.vocab_size, smollm2_tokenizer.bos_token_id, smollm2_tokenizer.context_tokens) == (49_152, 1, 8192)


@pytest.mark.model
def test_smollm2_chat(smollm2_tokenizer: Tokenizer, smollm2_oracle: Any) -> None:
    assert smollm2_tokenizer.chat_template is not None
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yo"},
        ],
    ):
        expected = smollm2_oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert smollm2_tokenizer.chat_template.render(messages) == expected


@pytest.mark.model
def test_smollm2_every_token_streams_as_it_decodes(smollm2_tokenizer: Tokenizer) -> None:
    ids = random.Random(0).sample(range(smollm2_tokenizer.vocab_size), 5000)
    assert _streamed(smollm2_tokenizer, ids) == smollm2_tokenizer.decode(ids)
    assert _streamed(smollm2_tokenizer, ids, skip_special_tokens=False) == smollm2_tokenizer.decode(
        ids, skip_special_tokens=False
    )
