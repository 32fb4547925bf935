"""The index against brute force over a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.semantic.scope_index import ScopeIndex

DIMENSIONS = 16


def unit(seed: int, dimensions: int = DIMENSIONS) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32)
    return vector / np.linalg.norm(vector)


@given(st.lists(st.tuples(st.sampled_from(["add", "add", "remove"]), st.integers(0, 10_000)), max_size=60), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_nearest_is_what_brute_force_finds(steps: list[tuple[str, int]], count: int) -> None:
    index = ScopeIndex(DIMENSIONS)
    held: dict[int, np.ndarray] = {}
    for what, seed in steps:
        if what == "add":
            row = index.add(unit(seed))
            assert row not in held
            held[row] = unit(seed)
        elif held:
            row = sorted(held)[seed % len(held)]
            del held[row]
            index.remove(row)
    assert len(index) == len(held)
    asked = unit(77_777)
    expected = sorted(((float(vector @ asked), row) for row, vector in held.items()), reverse=True)
    expected = [pair for pair in expected if pair[0] > 0][:count]
    found = index.nearest(asked, count)
    assert np.allclose([cosine for _, cosine in found], [cosine for cosine, _ in expected], atol=1e-5)
    assert all(np.isclose(float(held[row] @ asked), cosine, atol=1e-5) for row, cosine in found)


def test_a_large_index_finds_what_is_close() -> None:
    index = ScopeIndex(384)
    vectors = np.random.default_rng(1).standard_normal((9_000, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [index.add(vector) for vector in vectors]
    noise = np.random.default_rng(2)
    for place in range(0, 9_000, 300):
        asked = vectors[place] + 0.02 * noise.standard_normal(384).astype(np.float32)
        asked /= np.linalg.norm(asked)
        assert index.nearest(asked, 3)[0][0] == rows[place]
    index.remove(rows[300])
    assert index.nearest(vectors[300], 1)[0][0] != rows[300]
