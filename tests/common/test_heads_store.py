"""Which file of heads a model has: trained here before shipped, and shipped ones for the model that they name only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from common.heads_store import SHIPPED_FOR, find_heads, heads_path
from common.model_store import BUNDLED_MODELS


@pytest.mark.parametrize("model", SHIPPED_FOR)
def test_shipped_heads_are_those_of_the_model_that_they_are_found_for(tmp_path: Path, model: str) -> None:
    path = find_heads(tmp_path, model)
    assert path is not None
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["pdserve.heads"])["model"] == model
    assert path.stem in BUNDLED_MODELS


def test_what_was_made_here_comes_first(tmp_path: Path) -> None:
    (model, *_) = SHIPPED_FOR
    shipped = find_heads(tmp_path, model)
    made_here = heads_path(tmp_path, model)
    made_here.parent.mkdir()
    made_here.touch()
    assert find_heads(tmp_path, model) == made_here != shipped


def test_a_model_without_heads_has_none(tmp_path: Path) -> None:
    assert find_heads(tmp_path, "0" * 64) is None
