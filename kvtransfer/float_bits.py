"""Number formats as bit patterns: bfloat16, float16, float32 and the 8-bit float e4m3fn. Pure functions over numpy arrays.

    dtype      sign exponent mantissa   largest      stored here as
    float32      1      8       23      3.4e38       uint32
    bfloat16     1      8        7      3.39e38      uint16; the upper half of a float32
    float16      1      5       10      65504        uint16
    e4m3fn       1      4        3      448          uint8; bias 7, no infinity, 0x7F and 0xFF are NaN

All roundings are to nearest, ties to even. numpy has no bfloat16 and no 8-bit float: their bits are made with integer arithmetic.
This module knows neither blocks nor scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import HandoffError

Bits = npt.NDArray[np.unsignedinteger[Any]]
Floats = npt.NDArray[np.float32]

BITS: Mapping[str, np.dtype[Any]] = {"float32": np.dtype("<u4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2")}
"""How the values of a KV dtype are stored."""

LARGEST: Mapping[str, float] = {"float32": float(np.finfo(np.float32).max), "bfloat16": 255 * 2.0**120, "float16": 65504.0}
"""The largest finite value."""

E4M3_LARGEST = 448.0
E4M3_NAN = 0x7F


def to_float32(bits: Bits, dtype: str) -> Floats:
    """Exact."""
    match dtype:
        case "bfloat16":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "float16":
            return bits.view(np.float16).astype(np.float32)
        case _:
            return bits.view(np.float32)


def from_float32(values: Floats, dtype: str) -> Bits:
    """To nearest even. What is too large for `dtype` becomes infinite, NaN stays NaN."""
    match dtype:
        case "bfloat16":
            bits = values.view(np.uint32)
            rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
            # Adding to a NaN could carry into its sign; cutting it off could leave infinity: keep the top, set the quiet bit.
            quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
            return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
        case "float16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16).view(np.uint16)
        case _:
            return values.view(np.uint32)


def convert(bits: Bits, source_dtype: str, destination_dtype: str) -> Bits:
    """Values of one KV dtype as another. Raises HandoffError if a finite value is too large for the destination."""
    if source_dtype == destination_dtype:
        return bits
    values = to_float32(bits, source_dtype)
    converted = from_float32(values, destination_dtype)
    if LARGEST[destination_dtype] < LARGEST[source_dtype]:
        became = np.isinf(to_float32(converted, destination_dtype))
        if not np.array_equal(became, np.isinf(values)):
            raise HandoffError(f"a value of the KV is too large for {destination_dtype}", param="dtype")
    return converted


def to_e4m3(values: Floats) -> npt.NDArray[np.uint8]:
    """To nearest even; beyond 448 saturates. `values` must not be NaN."""
    bits = np.minimum(np.abs(values), np.float32(E4M3_LARGEST)).view(np.uint32)
    # Round 23 bits of mantissa to 3, a carry moves on into the exponent, as it should; then move the bias from 127 to 7.
    rounded = (bits + (np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1)))) >> np.uint32(20)
    normal = rounded.astype(np.int32) - ((127 - 7) << 3)
    subnormal = np.rint(bits.view(np.float32) * np.float32(2.0**9)).astype(np.int32)  # 8 is the smallest normal, code 0x08
    magnitude = np.where(bits.view(np.float32) < np.float32(2.0**-6), subnormal, normal)
    codes: npt.NDArray[np.uint8] = (magnitude | (np.signbit(values).astype(np.int32) << 7)).astype(np.uint8)
    return codes


def from_e4m3(codes: npt.NDArray[np.uint8]) -> Floats:
    """Exact."""
    return _E4M3[codes]


def _e4m3_values() -> Floats:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    magnitude[(codes & 0x7F) == E4M3_NAN] = np.nan
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


_E4M3 = _e4m3_values()
