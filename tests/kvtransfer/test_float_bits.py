from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.errors import HandoffError
from kvtransfer.float_bits import convert, from_e4m3, from_float32, to_e4m3, to_float32

DTYPES = ["float32", "bfloat16", "float16"]
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)
# Every upper half, with lower halves around the ties.
FLOAT32_BITS = (ALL_16_BITS.astype(np.uint32)[:, None] << 16) | np.array(
    [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32
)


def torch_view(bits: npt.NDArray[np.generic], dtype: str) -> torch.Tensor:
    signed = np.ascontiguousarray(bits).view({2: np.int16, 4: np.int32}[bits.itemsize])
    return torch.from_numpy(signed).view(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_16_bit_value_is_read_right_and_comes_back(dtype: str) -> None:
    values = to_float32(ALL_16_BITS, dtype)
    expected = torch_view(ALL_16_BITS, dtype).float().numpy()
    finite = ~np.isnan(expected)
    assert np.array_equal(values, expected, equal_nan=True)
    assert np.array_equal(from_float32(values, dtype)[finite], ALL_16_BITS[finite])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(dtype: str) -> None:
    values = FLOAT32_BITS.view(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    nan = np.isnan(values)
    bits = from_float32(values, dtype)
    assert np.array_equal(bits[~nan], expected.view(getattr(torch, f"uint{bits.itemsize * 8}")).numpy()[~nan])
    assert np.isnan(to_float32(bits, dtype)[nan]).all()


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("destination", DTYPES)
def test_conversion_of_what_fits(source: str, destination: str) -> None:
    values = np.random.default_rng(0).normal(0, 100, 10_000).astype(np.float32)
    bits = from_float32(values, source)
    expected = torch_view(bits, source).to(getattr(torch, destination))
    assert convert(bits, source, destination).tobytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("source", "destination", "value"),
    [("float32", "float16", 65520.0), ("bfloat16", "float16", -1e5), ("float32", "bfloat16", np.finfo(np.float32).max)],
)
def test_what_would_become_infinite_is_refused(source: str, destination: str, value: float) -> None:
    for values, fits in (([1.0, value], False), ([1.0, np.inf, np.nan], True)):
        bits = from_float32(np.array(values, np.float32), source)
        if fits:
            assert np.isinf(to_float32(convert(bits, source, destination), destination)).tolist() == np.isinf(values).tolist()
        else:
            with pytest.raises(HandoffError) as refused:
                convert(bits, source, destination)
            assert refused.value.param == "dtype"


def test_every_e4m3_code_is_read_right_and_comes_back() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(from_e4m3(codes), expected, equal_nan=True)
    finite = ~np.isnan(expected)
    assert np.array_equal(to_e4m3(expected[finite]), codes[finite])


def test_e4m3_rounds_to_the_nearest_even_code() -> None:
    """Against a search through all codes, in exact arithmetic: float64 holds float32 differences of this range."""
    code_values = from_e4m3(np.arange(0x7F, dtype=np.uint8)).astype(np.float64)
    middles = (code_values[:-1] + code_values[1:]) / 2
    around = middles.astype(np.float32)
    values = np.concatenate(
        [
            around,
            np.nextafter(around, np.float32(0)),
            np.nextafter(around, np.float32(1e9)),
            np.random.default_rng(0).normal(0, 2, 5000).astype(np.float32),
            np.array([0, 1e-30, 2.0**-10, 2.0**-149], np.float32),
        ]
    )
    distance = np.abs(np.abs(values).astype(np.float64)[:, None] - code_values)
    nearest = [min(np.flatnonzero(row == row.min()), key=lambda code: code & 1) for row in distance]
    for sign in (1, -1):
        codes = to_e4m3(np.float32(sign) * values)
        assert (codes & 0x7F).tolist() == nearest
        assert np.array_equal(codes >> 7, np.signbit(np.float32(sign) * values))


def test_e4m3_saturates() -> None:
    values = np.array([448, 449, 480, 1e30, np.inf, -1e30], np.float32)
    assert from_e4m3(to_e4m3(values)).tolist() == [448.0] * 5 + [-448.0]
