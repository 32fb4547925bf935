"""What the waist derives: the layout's sizes and its fingerprint; and that its values are values."""

from __future__ import annotations

import dataclasses

import pytest

from common.types import KVLayout, Request, SamplingParams

LAYOUT = KVLayout(
    model_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    block_tokens=16,
    dtype="bfloat16",
    exact=False,
)
OTHER = {
    "model_digest": "ba" * 32,
    "tokenizer_digest": "ab" * 32,
    "num_layers": 31,
    "num_kv_heads": 4,
    "head_dim": 32,
    "block_tokens": 32,
    "dtype": "float16",
    "exact": True,
}


def test_smollm2_block_is_360_kib_in_bfloat16() -> None:
    assert LAYOUT.block_bytes == 360 * 1024
    assert dataclasses.replace(LAYOUT, dtype="float32").block_bytes == 720 * 1024


def test_each_field_changes_the_fingerprint() -> None:
    assert OTHER.keys() == {field.name for field in dataclasses.fields(KVLayout)}
    prints = [LAYOUT.fingerprint, *(dataclasses.replace(LAYOUT, **{name: value}).fingerprint for name, value in OTHER.items())]
    assert all(len(item) == 32 for item in prints)
    assert len(set(prints)) == len(OTHER) + 1
    assert dataclasses.replace(LAYOUT).fingerprint == LAYOUT.fingerprint


def test_the_fingerprint_is_the_same_in_every_process() -> None:
    # Held as a constant: two workers of different builds must agree on it, or refuse each other.
    assert LAYOUT.fingerprint.hex() == "27296526442feabb41ac27aae83c71847b8590bbb7560d247b1f64535bbec326"


def test_requests_are_values() -> None:
    sampling = SamplingParams(max_tokens=4, seed=1)
    one, same = (Request("r", "m", (1, 2, 3), sampling) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one.num_prompt_tokens == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.model = "other"


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-9, False), (1.0, False)])
def test_greedy_is_temperature_zero(temperature: float, greedy: bool) -> None:
    assert SamplingParams(max_tokens=1, seed=0, temperature=temperature).greedy is greedy
