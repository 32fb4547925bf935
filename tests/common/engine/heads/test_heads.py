"""Guesses of heads against the formula worked out one sequence at a time in NumPy, and files of heads that do not fit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.engine.heads.file import Description, HeadWeights, as_written, read_heads, write_heads
from common.engine.heads.heads import DraftHeads, load_heads
from common.engine.heads.rows import HiddenRow
from common.errors import ConfigError
from support.tiny_heads import make_tiny_heads, make_weights
from support.tiny_models import make_tiny_model

DESCRIPTION = Description("d" * 64, 4, hidden_size=24, vocab_size=60, width=20)
WORDS = list(range(5, 45))
HEAD = torch.randn(len(WORDS), 24, generator=torch.Generator().manual_seed(1))
EMBEDDING = 0.03 * torch.randn(len(WORDS), 24, generator=torch.Generator().manual_seed(2))


def rows(count: int, *, padding: int = 0) -> list[HiddenRow]:
    values = 7.0 * torch.randn(count, 24 + padding, generator=torch.Generator().manual_seed(3))
    return [HiddenRow(row) for row in values]


def heads(weights: HeadWeights) -> DraftHeads:
    return DraftHeads(weights, HEAD, EMBEDDING, torch.device("cpu"), torch.float32)


def expected(weights: HeadWeights, row: HiddenRow, token: int, count: int) -> list[int]:
    """Straight from the formula, in double precision."""
    named = {name: getattr(weights, name).double().numpy() for name in ("norm", "keep", "bias", "state", "word", "out")}
    embedding = EMBEDDING.double().numpy()
    embedding = embedding / np.sqrt((embedding**2).mean())
    hidden = row.values[:24].double().numpy()
    state = hidden / np.sqrt((hidden**2).mean() + 1e-5) * named["norm"]
    found = []
    for _ in range(count):
        embedded = embedding[WORDS.index(token)] if token in WORDS else np.zeros(24)
        inner = named["state"] @ state + named["word"] @ embedded + named["bias"]
        state = named["keep"] * state + named["out"] @ (inner / (1 + np.exp(-inner)))
        token = WORDS[int(np.argmax(HEAD.double().numpy() @ state))]
        found.append(token)
    return found


@pytest.mark.parametrize("padding", [0, 8])
def test_guesses_are_those_of_the_formula(padding: int) -> None:
    weights = make_weights(DESCRIPTION, WORDS)
    given, tokens = rows(12, padding=padding), [*range(3, 50, 4)]
    guesses, sure = heads(weights).guess(given, tokens, 4)
    assert guesses == [expected(weights, row, token, 4) for row, token in zip(given, tokens, strict=True)]
    assert all(0.0 < certainty <= 1.0 for certainty in sure)
    assert len({tuple(guess) for guess in guesses}) > 6


def test_a_guess_depends_on_row_and_token() -> None:
    guesser = heads(make_weights(DESCRIPTION, WORDS))
    row, other = rows(2)
    alone = guesser.guess([row], [7], 4)[0][0]
    assert guesser.guess([row, other], [7, 7], 4)[0][0] == alone
    assert guesser.guess([other], [7], 4)[0][0] != alone
    assert any(guesser.guess([row], [token], 4)[0][0] != alone for token in WORDS)


def test_a_row_of_anything_is_survived() -> None:
    """It comes over a network."""
    guesser = heads(make_weights(DESCRIPTION, WORDS))
    for value in (float("nan"), float("inf"), -float("inf"), 3e38, 0.0):
        guesses, sure = guesser.guess([HiddenRow(torch.full((24,), value))], [7], 4)
        assert set(guesses[0]) <= set(WORDS)
        assert 0.0 <= sure[0] <= 1.0
    assert not guesser.fits(HiddenRow.from_bytes(b"123"))
    assert not guesser.fits(HiddenRow.from_bytes(b""))


def test_rows_travel_as_bf16() -> None:
    row = rows(1)[0]
    arrived = HiddenRow.from_bytes(row.to_bytes())
    assert len(row.to_bytes()) == 48
    assert torch.equal(arrived.values, row.values.bfloat16())


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "heads.safetensors"
    weights = make_weights(DESCRIPTION, WORDS)
    write_heads(path, weights)
    found = read_heads(path, model=DESCRIPTION.model, hidden_size=24, vocab_size=60)
    assert found.description == DESCRIPTION
    assert found.tokens.tolist() == WORDS
    assert torch.equal(found.norm, weights.norm)
    for name in ("state", "word", "out"):
        matrix = getattr(weights, name)
        step = matrix.abs().amax(dim=1, keepdim=True) / 127
        assert ((getattr(found, name) - matrix).abs() <= 0.51 * step).all()
        assert torch.equal(getattr(as_written(weights), name), getattr(found, name))
    assert [file.name for file in path.parent.iterdir()] == ["heads.safetensors"]


def damaged(change: dict[str, Any]) -> HeadWeights:
    return replace(make_weights(DESCRIPTION, WORDS), **change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"keep": torch.ones(23)}, "keep is"),
        ({"bias": torch.ones(20, dtype=torch.float16)}, "bias is"),
        ({"norm": torch.full((24,), float("nan"))}, "norm is not finite"),
        ({"tokens": torch.tensor([5] * 40)}, "twice"),
        ({"tokens": torch.tensor([*range(59, 99)])}, "does not have"),
        ({"out": torch.ones(24, 21)}, "out is"),
        ({"description": replace(DESCRIPTION, num_guesses=0)}, "another version"),
        ({"description": replace(DESCRIPTION, num_guesses=65)}, "at most 64"),
        ({"description": replace(DESCRIPTION, width=21)}, "bias is"),
        ({"description": replace(DESCRIPTION, model="e" * 64)}, "another model"),
        ({"description": replace(DESCRIPTION, hidden_size=25)}, "another model"),
        ({"description": replace(DESCRIPTION, vocab_size=61)}, "another model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_heads_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "heads.safetensors"
    write_heads(path, damaged(change))
    with pytest.raises(ConfigError, match=reason) as caught:
        read_heads(path, model=DESCRIPTION.model, hidden_size=24, vocab_size=60)
    assert caught.value.param == "decode.speculation.heads"


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    good, path = tmp_path / "good", tmp_path / "heads.safetensors"
    write_heads(good, make_weights(DESCRIPTION, WORDS))
    tensors = load_file(good)

    def refused(reason: str) -> None:
        with pytest.raises(ConfigError, match=reason) as caught:
            read_heads(path, model=DESCRIPTION.model, hidden_size=24, vocab_size=60)
        assert caught.value.param == "decode.speculation.heads"

    refused("cannot read")
    path.write_bytes(b"not a file of tensors")
    refused("cannot read")
    path.write_bytes(good.read_bytes()[:-8])
    refused("cannot read")
    save_file(tensors, path)
    refused("no file of heads")
    for header in ("[]", "{}", "{", '{"format": 1, "model": 5}'):
        save_file(tensors, path, {"pdserve.heads": header})
        refused("no file of heads")
    header = json.dumps({"format": 1, **asdict(DESCRIPTION)})
    for names in (set(tensors) - {"bias"}, set(tensors) - {"tokens"}):
        save_file({name: tensors[name] for name in names}, path, {"pdserve.heads": header})
        refused("lacks tensors")
    save_file({**tensors, "more": torch.ones(1)}, path, {"pdserve.heads": header})
    refused("unknown")
    save_file(tensors, path, {"pdserve.heads": header})
    assert read_heads(path, model=DESCRIPTION.model, hidden_size=24, vocab_size=60).description == DESCRIPTION


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_missing_comes_from_the_model(tmp_path: Path, tied: bool) -> None:
    model = make_tiny_model(tmp_path / "model", tie_embeddings=tied)
    path = make_tiny_heads(tmp_path / "heads.safetensors", model, words=[9, 4, 200])
    digest = read_digest(path)
    loaded = load_heads(path, model, model_digest=digest, device=torch.device("cpu"), dtype=torch.float32)
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"][[9, 4, 200]].bfloat16().float()
    head = embedding if tied else tensors["lm_head.weight"][[9, 4, 200]].bfloat16().float()
    weights = read_heads(path, model=digest, hidden_size=64, vocab_size=384)
    by_hand = DraftHeads(weights, head, embedding, torch.device("cpu"), torch.float32)
    row = HiddenRow(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    assert loaded.guess([row], [9], 3) == by_hand.guess([row], [9], 3)
    with pytest.raises(ConfigError, match="another model"):
        load_heads(path, model, model_digest="f" * 64, device=torch.device("cpu"), dtype=torch.float32)


def read_digest(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        model: str = json.loads(file.metadata()["pdserve.heads"])["model"]
    return model
