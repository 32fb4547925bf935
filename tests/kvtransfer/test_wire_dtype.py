from __future__ import annotations

import itertools
import random
import struct
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings

from common.errors import HandoffError, HandshakeRefused
from common.types import KVLayout
from kvtransfer import wire_dtype
from kvtransfer.wire_dtype import LOGIT_BUDGETS, LogitBudget, WireDtype, WireFormat, decode, encode

if TYPE_CHECKING:
    from common.engine.engine import Engine
    from common.model_store import ModelFiles

Values = npt.NDArray[np.float32]
KINDS = list(WireDtype)
LAYOUT = KVLayout("model", "tokenizer", 3, 2, 8, 4, "bfloat16", False)
SHAPE = (LAYOUT.num_layers, LAYOUT.num_kv_heads, 2, LAYOUT.block_tokens, LAYOUT.head_dim)
LARGEST_CODE = {WireDtype.INT8: 127, WireDtype.FP8_E4M3: 448}
SLACK = 1 + 2.0**-14


def in_dtype(values: Values, dtype: str) -> bytes:
    return bytes(torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes())


def as_values(block: bytes, dtype: str, shape: tuple[int, ...]) -> Values:
    return torch.frombuffer(bytearray(block), dtype=getattr(torch, dtype)).float().reshape(shape).numpy()


def half_ulp(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """How far rounding to `dtype` may move a value, from the format's definition: mantissa bits and smallest exponent."""
    mantissa, smallest = {"float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14)}[dtype]
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, smallest)
    return np.ldexp(0.5, exponent - mantissa)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[WireFormat, Values]:
    """Values as KV has them and as it does not: rows of very different sizes, outliers, zeros, the edges of the dtype."""
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    head_dim = draw(st.sampled_from([1, 2, 6, 8]))
    layout = KVLayout("m", "t", draw(st.integers(1, 3)), draw(st.integers(1, 3)), head_dim, draw(st.integers(1, 5)), dtype, False)
    group = draw(st.sampled_from([0, *(size for size in range(1, head_dim + 1) if head_dim % size == 0)]))
    shape = (layout.num_layers, layout.num_kv_heads, 2, layout.block_tokens, layout.head_dim)
    dice = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    largest = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}[dtype]
    lowest, highest = {"float32": (-149, 127), "bfloat16": (-133, 127), "float16": (-24, 15)}[dtype]
    exponents = draw(st.sampled_from([(-3, 3), (lowest, highest), (lowest, lowest + 8), (highest - 2, highest)]))
    values = dice.normal(0, 1, shape) * np.exp2(dice.integers(*exponents, size=(*shape[:-1], 1)).astype(np.float64))
    values[dice.random(shape) < 0.1] *= 50
    values[dice.random(shape[:-1]) < 0.1] = 0
    values[dice.random(shape) < 0.05] = draw(st.sampled_from([0.0, -0.0, largest, -largest]))
    clipped = np.clip(values, -largest, largest).astype(np.float32)
    exact = as_values(in_dtype(clipped, dtype), dtype, shape)
    return WireFormat(draw(st.sampled_from(KINDS)), layout, group), np.where(np.isfinite(exact), exact, np.float32(largest))


def contract_holds(wire: WireFormat, sent: Values, arrived: Values) -> None:
    groups, there = (part.astype(np.float64).reshape(-1, sent.shape[-1] // wire.row_groups) for part in (sent, arrived))
    largest = np.abs(groups).max(axis=1, keepdims=True)
    scale = largest / LARGEST_CODE[wire.dtype]
    # The scale is rounded up to a float32, by less than its spacing; that only shows where float32 itself ends.
    scale += np.where(scale > 0, np.maximum(scale * 2.0**-23, 2.0**-149), 0)
    bound = scale / 2 if wire.dtype is WireDtype.INT8 else np.maximum(np.abs(groups) / 16, scale / 1024)
    bound = bound * SLACK
    assert np.isfinite(there).all()
    assert (np.abs(there - groups) <= bound + half_ulp(np.abs(groups) + bound, wire.layout.dtype)).all()
    assert (there[groups == 0] == 0).all()


@settings(max_examples=300, deadline=None)
@given(blocks())
def test_no_value_moves_further_than_promised(block: tuple[WireFormat, Values]) -> None:
    wire, values = block
    encoded = encode(memoryview(in_dtype(values, wire.layout.dtype)), wire)
    assert len(encoded) == wire.block_bytes
    decoded = decode(encoded, wire)
    assert len(decoded) == wire.layout.block_bytes
    contract_holds(wire, values, as_values(decoded, wire.layout.dtype, values.shape))


@settings(max_examples=100, deadline=None)
@given(blocks(), st.data())
def test_layers_travel_by_themselves(block: tuple[WireFormat, Values], data: st.DataObject) -> None:
    """A range of layers of the encoded block is the encoding of that range of the block, and decodes to it."""
    wire, values = block
    whole = in_dtype(values, wire.layout.dtype)
    first = data.draw(st.integers(0, wire.layout.num_layers - 1))
    end = data.draw(st.integers(first + 1, wire.layout.num_layers))
    layer_bytes = wire.layout.block_bytes // wire.layout.num_layers
    piece = encode(memoryview(whole)[first * layer_bytes : end * layer_bytes], wire)
    encoded = encode(memoryview(whole), wire)
    assert piece == encoded[first * wire.layer_bytes : end * wire.layer_bytes]
    assert decode(piece, wire) == decode(encoded, wire)[first * layer_bytes : end * layer_bytes]


@pytest.mark.parametrize(("kind", "group"), [*itertools.product(KINDS, (0, 4))])
def test_an_encoded_block_lies_as_documented(kind: WireDtype, group: int) -> None:
    """Read with struct alone, by the words of the docstring."""
    wire = WireFormat(kind, LAYOUT, group)
    values = as_values(in_dtype(np.random.default_rng(0).normal(0, 3, SHAPE).astype(np.float32), "bfloat16"), "bfloat16", SHAPE)
    encoded = encode(memoryview(in_dtype(values, "bfloat16")), wire)
    per_row = 8 // (group or 8)
    rows = 2 * 2 * 4
    assert wire.layer_bytes == rows * (8 + 4 * per_row)
    assert wire.block_bytes == len(encoded) == 3 * wire.layer_bytes
    for layer, head, half, token in itertools.product(range(3), range(2), range(2), range(4)):
        row = (head * 2 + half) * 4 + token
        start = layer * wire.layer_bytes
        scales = struct.unpack_from(f"<{per_row}f", encoded, start + rows * 8 + row * 4 * per_row)
        for dim in range(8):
            code = encoded[start + row * 8 + dim]
            if kind is WireDtype.INT8:
                number = Fraction(code - 256 if code > 127 else code)
            else:
                exponent, mantissa = code >> 3 & 15, code & 7
                number = Fraction(8 + mantissa) * Fraction(2) ** (exponent - 10) if exponent else Fraction(mantissa, 512)
                number = -number if code & 0x80 else number
            scale = Fraction(scales[dim // (group or 8)])
            value = Fraction(float(values[layer, head, half, token, dim]))
            assert abs(number * scale - value) <= max(abs(value) / 16, scale / 2)
            arrived = float(torch.tensor(float(number * scale), dtype=torch.float64).to(torch.bfloat16))
            assert as_values(decode(encoded, wire), "bfloat16", SHAPE)[layer, head, half, token, dim] == arrived


def test_sizes_of_the_default_model() -> None:
    smollm2 = KVLayout("m", "t", 30, 3, 64, 16, "bfloat16", False)
    assert smollm2.block_bytes == 360 * 1024
    assert [WireFormat(kind, smollm2).block_bytes for kind in KINDS] == [195_840] * 2  # 0.53
    assert WireFormat(WireDtype.INT8, smollm2, 16).block_bytes == 230_400


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_values_arrive_whole(kind: WireDtype) -> None:
    """The greatest of a group is its own yardstick: it comes back as it was."""
    values = as_values(in_dtype(np.random.default_rng(1).normal(0, 3, SHAPE).astype(np.float32), "bfloat16"), "bfloat16", SHAPE)
    wire = WireFormat(kind, LAYOUT)
    arrived = as_values(decode(encode(memoryview(in_dtype(values, "bfloat16")), wire), wire), "bfloat16", SHAPE)
    peaks = np.abs(values) == np.abs(values).max(axis=-1, keepdims=True)
    assert np.array_equal(arrived[peaks], values[peaks])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_refused_but_not_in_tokens_that_do_not_exist(kind: WireDtype, dtype: str, bad: float) -> None:
    wire = WireFormat(kind, replace(LAYOUT, dtype=dtype))
    values = np.ones(SHAPE, np.float32)
    values[1, 1, 0, 2, 5] = bad
    block = in_dtype(values, dtype)
    for num_tokens in (3, 4, None):
        with pytest.raises(HandoffError, match="finite"):
            encode(memoryview(block), wire, num_tokens=num_tokens)
    arrived = as_values(decode(encode(memoryview(block), wire, num_tokens=2), wire), dtype, SHAPE)
    np.testing.assert_allclose(arrived[..., :2, :], 1, rtol=1e-6)
    assert (arrived[..., 2:, :] == 0).all()


def test_formats_that_cannot_be_are_refused_by_name() -> None:
    def param_of(layout: KVLayout, group: int = 0) -> str | None:
        with pytest.raises(HandshakeRefused) as refused:
            WireFormat(WireDtype.INT8, layout, group)
        return refused.value.param

    assert param_of(replace(LAYOUT, exact=True)) == "exact"
    assert param_of(replace(LAYOUT, dtype="float64")) == "dtype"
    for group in (-1, 3, 16):
        assert param_of(LAYOUT, group) == "group_values"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_no_encoder_made_are_refused(kind: WireDtype) -> None:
    wire = WireFormat(kind, LAYOUT)
    block = in_dtype(np.ones(SHAPE, np.float32), "bfloat16")
    encoded = encode(memoryview(block), wire)

    def refused(call: Callable[[], object]) -> str | None:
        with pytest.raises(HandoffError) as caught:
            call()
        return caught.value.param

    for wrong in (b"", encoded[:-1], encoded + b"\0", encoded + encoded):
        assert refused(lambda wrong=wrong: decode(wrong, wire)) == "size_bytes"  # type: ignore[misc]
    for wrong in (b"", block[:-1], block + block):
        assert refused(lambda wrong=wrong: encode(memoryview(wrong), wire)) == "size_bytes"  # type: ignore[misc]
    for num_tokens in (0, -1, 5):
        assert refused(lambda n=num_tokens: encode(memoryview(block), wire, num_tokens=n)) == "num_tokens"  # type: ignore[misc]
    no_code = bytes([0x80 if kind is WireDtype.INT8 else 0xFF])
    assert refused(lambda: decode(no_code + encoded[1:], wire)) == "code"
    for scale in (np.nan, np.inf, -1.0):
        assert refused(lambda scale=scale: decode(encoded[:-4] + struct.pack("<f", scale), wire)) == "scale"  # type: ignore[misc]


def _rounded_up(scaled: Values, dtype: WireDtype) -> npt.NDArray[np.uint8]:
    return np.ceil(scaled).astype(np.int8).view(np.uint8)


def _too_coarse(largest: Values, largest_code: float) -> Values:
    return (largest / 64).astype(np.float32)


def _one_scale_for_all(largest: Values, largest_code: float) -> Values:
    return np.full_like(largest, largest.max() / largest_code)


WRONG = [("_to_codes", _rounded_up), ("_scales", _too_coarse), ("_scales", _one_scale_for_all)]


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=lambda part: getattr(part, "__name__", part))
def test_the_contract_notices_a_wrong_encoder(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(0, 3, SHAPE).astype(np.float32)
    wire = WireFormat(WireDtype.INT8, replace(LAYOUT, dtype="float32"))
    block = memoryview(in_dtype(values, "float32"))
    contract_holds(wire, values, as_values(decode(encode(block, wire), wire), "float32", SHAPE))
    monkeypatch.setattr(wire_dtype, name, wrong)
    with pytest.raises(AssertionError):
        contract_holds(wire, values, as_values(decode(encode(block, wire), wire), "float32", SHAPE))


# -- what it does to the answers -------------------------------------------------------------------------------------------

NUM_GIVEN = 64
PROSE = """The harbour master kept two books. In the first he wrote what the law asked for: the name of each ship, where she came
from, what she carried, how much water she drew, and the hour at which her lines were made fast. In the second he wrote what
nobody had asked for. On the ninth of March, for instance, the first book says that the brig Adelaide, of Bergen, landed forty
barrels of herring and a crate of window glass. The second book says that her mate had lost two fingers since autumn, that he
tied his knots as quickly as before, and that the ship's cat had learned to wait for the third bell before going ashore.
When the old man died the town council sold the first book to a museum, which put it under glass, open at a page about salt.
The second book went to his niece. She taught arithmetic at the girls' school, and for a whole winter she read one page of it
aloud every Friday, so that her pupils would know that counting is not the same as noticing. Some of them wrote letters to the
museum and asked whether the two books could be shown side by side. The director answered politely that space was limited.
Many years later one of those pupils became director herself. The first thing she did was to measure the case, and she found
that there had always been room for two. The second thing she did was to walk down to the harbour with an empty notebook."""


@dataclass(frozen=True)
class Change:
    """By how much logits differ, over all given positions of all texts."""

    largest: float
    rms: float
    same_first_choice: float
    deviation: float  # of the logits themselves

    def keeps(self, budget: LogitBudget) -> bool:
        return (
            self.largest <= budget.largest_difference
            and self.rms <= budget.rms_difference
            and self.same_first_choice >= budget.same_first_choice
        )


def build(smollm2: ModelFiles, dtype: str, weights: str) -> Engine:
    from common.config import EngineConfig
    from common.engine.engine import build_engine

    config = EngineConfig(device="cpu", dtype=dtype, weights=weights, exact=False, kv_pool_tokens=2048)
    return build_engine(smollm2.path, config, threads=1, model_digest="m", tokenizer_digest="t")


def texts(smollm2: ModelFiles) -> Iterator[list[int]]:
    """Prose, law and code: 200 to 400 tokens of prompt, and those that are given after it."""
    from common.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(smollm2.path)
    law = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    code = Path(textwrap.__file__).read_text(encoding="utf-8")
    for text, num_prompt in ((PROSE, 205), (law[200:], 300), (code, 390)):
        tokens = tokenizer.encode(text)[: num_prompt + NUM_GIVEN]
        assert len(tokens) == num_prompt + NUM_GIVEN
        yield tokens


class Prefilled:
    """The KV of the texts' prompts, to be put back, changed or not, as often as one likes."""

    def __init__(self, engine: Engine, texts: list[list[int]]) -> None:
        self._engine, self._texts = engine, texts
        self._pool = np.frombuffer(engine.pool.buffer, np.uint8).reshape(engine.pool.num_blocks, -1)
        self._tables = [engine.blocks.allocate(self._num_blocks(len(tokens))) for tokens in texts]
        for tokens, table in zip(texts, self._tables, strict=True):
            random.Random(0).shuffle(table)
            self._run(tokens[:-NUM_GIVEN], 0, table)
        self._computed = self._pool.copy()

    def logits(self, through: Callable[[memoryview, int], bytes]) -> torch.Tensor:
        """After each of the given tokens of all texts, computed on KV of which each block has gone `through`."""
        rows = []
        for tokens, table in zip(self._texts, self._tables, strict=True):
            num_prompt = len(tokens) - NUM_GIVEN
            for logical, block in enumerate(table[: self._num_blocks(num_prompt)]):
                num_tokens = min(self._engine.layout.block_tokens, num_prompt - logical * self._engine.layout.block_tokens)
                self._pool[block] = np.frombuffer(through(self._computed[block].data, num_tokens), np.uint8)
            rows.append(self._run(tokens[num_prompt:], num_prompt, table))
        return torch.cat(rows)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._engine.layout.block_tokens)

    def _run(self, tokens: list[int], start: int, table: list[int]) -> torch.Tensor:
        from common.engine.batch import ScheduledBatch, SequenceSlice

        batch = ScheduledBatch((SequenceSlice(tokens, start, table),))
        return self._engine.runner.compute_all_logits(batch) if start else self._engine.runner.compute_logits(batch)


def change_of(logits: torch.Tensor, plain: torch.Tensor) -> Change:
    difference = (plain - logits).abs()
    same = (plain.argmax(-1) == logits.argmax(-1)).float().mean()
    return Change(float(difference.max()), float(difference.square().mean().sqrt()), float(same), float(plain.std()))


@pytest.mark.model
@pytest.mark.parametrize(("dtype", "weights"), [("float32", "model"), ("bfloat16", "model"), ("bfloat16", "file")])
def test_the_default_model_stays_within_the_budget_of_its_logits(smollm2: ModelFiles, dtype: str, weights: str) -> None:
    engine = build(smollm2, dtype, weights)
    prefilled = Prefilled(engine, list(texts(smollm2)))
    plain = prefilled.logits(lambda block, _: bytes(block))
    assert torch.equal(prefilled.logits(lambda block, _: bytes(block)), plain), "the engine does not repeat itself"
    for kind in KINDS:
        wire = WireFormat(kind, engine.layout)
        logits = prefilled.logits(lambda block, tokens, wire=wire: decode(encode(block, wire, num_tokens=tokens), wire))  # type: ignore[misc]
        change = change_of(logits, plain)
        assert not torch.equal(logits, plain), "the engine did not use the KV that had travelled"
        engine_kind = f"{dtype}, file" if weights == "file" else dtype
        assert change.keeps(LOGIT_BUDGETS[kind, engine_kind]), (kind, change)
