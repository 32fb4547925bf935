"""The best token of a row, as the head finds it, against numpy over all logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.engine.automata import Words
from common.engine.cores import OwnCores
from common.engine.kv_pool import KVPool
from common.engine.loader import ModelArchitecture
from common.engine.models import TokenPicker
from common.engine.native.library import Library
from common.engine.native.model import NativeModel
from common.engine.native.panels import ModelPanels
from common.engine.quantisation import WeightFormat
from common.types import KVLayout

HIDDEN, WIDTH = 72, 96


def model_of(
    library: Library, vocab: int, threads: int, *, equal: Sequence[tuple[int, int]] = (), weight_format: WeightFormat
) -> NativeModel:
    """Made up. Of the tokens that are `equal` in pairs the logits are."""
    architecture = ModelArchitecture("llama", 1, HIDDEN, 4, 2, 16, 32, vocab, 10_000.0, None, 1e-5, 64, True, False)
    generator = torch.Generator().manual_seed(vocab)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in architecture.tensor_shapes().items()}
    for one, other in equal:
        weights["model.embed_tokens.weight"][other] = weights["model.embed_tokens.weight"][one]
    pool = KVPool(KVLayout("", "", 1, 2, 16, 16, "float32", False), 2, torch.device("cpu"))
    panels = ModelPanels.of(architecture, weights, weight_format)
    return NativeModel(library, architecture, panels, pool, 64, OwnCores(threads))


def rows_of(seed: int, count: int) -> torch.Tensor:
    rows = torch.zeros(count, WIDTH)
    rows[:, :HIDDEN] = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return rows


def words_of(tokens: Sequence[int], vocab: int) -> Words:
    """With the place of the end behind them, as masks of grammars have it."""
    bits = np.zeros((vocab + 1 + 31) // 32 * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_best_token_is_the_first_of_the_largest_logits_that_may_come(library: Library, data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 31, 32, 33, 64, 100, 700]))
    token = st.integers(0, vocab - 1)
    equal = data.draw(st.lists(st.tuples(token, token), max_size=6))
    weight_format = data.draw(st.sampled_from([WeightFormat.MODEL, WeightFormat.INT8]))
    model = model_of(library, vocab, data.draw(st.integers(1, 3)), equal=equal, weight_format=weight_format)
    assert isinstance(model, TokenPicker)
    hidden = rows_of(data.draw(st.integers(0, 99)), data.draw(st.integers(1, 20)))
    logits = model.logits(hidden).numpy()
    masks: list[Words | None] = []
    expected = []
    for row in logits:
        kind = data.draw(st.sampled_from(["all", "some", "equal ones"]))
        tokens = range(vocab) if kind == "all" else sorted(data.draw(st.sets(token, min_size=1)))
        if kind == "equal ones" and equal:
            tokens = sorted(equal[0])
        masks.append(None if kind == "all" else words_of(tokens, vocab))
        expected.append(tokens[int(row[list(tokens)].argmax())])
    assert list(model.pick(hidden, masks)) == expected


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 40, HIDDEN - 1])
def test_a_row_that_is_not_finite_has_no_token(library: Library, broken: float, place: int) -> None:
    model = model_of(library, 100, 2, weight_format=WeightFormat.MODEL)
    hidden = rows_of(1, 3)
    expected = model.logits(hidden).numpy().argmax(axis=1).tolist()
    hidden[1, place] = broken
    assert not np.isfinite(model.logits(hidden).numpy()[1].max())
    mask = words_of(range(3, 60), 100)
    assert list(model.pick(hidden, [None] * 3)) == [expected[0], -1, expected[2]]
    assert list(model.pick(hidden, [None, mask, None])) == [expected[0], -1, expected[2]]


@pytest.mark.parametrize("is_allowed", [False, True])
def test_one_broken_logit_is_noticed_whether_or_not_it_may_come(library: Library, is_allowed: bool) -> None:
    """As if a single output of the head were broken memory."""
    architecture = ModelArchitecture("llama", 1, HIDDEN, 4, 2, 16, 32, 100, 10_000.0, None, 1e-5, 64, True, False)
    weights = {name: torch.ones(shape) for name, shape in architecture.tensor_shapes().items()}
    weights["model.embed_tokens.weight"][77, 5] = float("nan")
    pool = KVPool(KVLayout("", "", 1, 2, 16, 16, "float32", False), 2, torch.device("cpu"))
    model = NativeModel(library, architecture, ModelPanels.of(architecture, weights, WeightFormat.MODEL), pool, 64, OwnCores(1))
    assert list(model.pick(rows_of(0, 1), [words_of([3, 77] if is_allowed else [3], 100)])) == [-1]


def test_a_row_without_a_token_that_may_come_has_none(library: Library) -> None:
    model = model_of(library, 100, 1, weight_format=WeightFormat.MODEL)
    assert list(model.pick(rows_of(0, 1), [words_of([], 100)])) == [-1]
