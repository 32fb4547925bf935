"""KV at one byte a value for slow links: int8, or the 8-bit float e4m3, with a scale per group of values. Lossy; says how much.

A group is `group_values` neighbouring dimensions of one (layer, kv_head, K or V, token); by default all `head_dim` of them. With
m = the largest magnitude of a group, a value x travels as a code c and the group's scale s, and arrives as y:

    wire      s (float32, rounded up)   c                              |c * s - x| at most                  then y
    int8      m / 127                   round(x / s), -127 .. 127      s / 2                                rounds c * s to the
    fp8_e4m3  m / 448                   e4m3(x / s), saturating        max(|x| / 16, s / 1024)              block's dtype

All roundings are to nearest, ties to even; float32 arithmetic adds less than 2^-14 of a bound. Zero arrives as zero. A value
that is NaN or infinite is refused (HandoffError); so is an encoding that no encoder makes.

An encoded block. Layers follow each other, so that a range of layers (a piece) encodes and travels by itself:

    [layer] { codes  [kv_head][K,V][token][head_dim]                  1 byte each
              scales [kv_head][K,V][token][head_dim / group_values]   float32, little-endian; 0 for a group of zeros }

    layer_bytes = num_kv_heads * 2 * block_tokens * (head_dim + 4 * head_dim / group_values)

With head_dim 64 or 128 and one group per row that is 0.53 or 0.52 of bfloat16, 0.27 or 0.26 of float32. In a block that is partly
filled only `num_tokens` tokens mean anything; the others, whatever is there, travel and arrive as zeros.

What it does to the answers. SmolLM2-135M, fast numerics, three texts with 205 to 390 prompt tokens, all of whose KV went through
encode and decode, then 64 given tokens each; logits (standard deviation 7.0) after those, against untouched KV:

    engine     what was changed                  largest |difference|   root mean square   same first choice
    float32    int8                              0.24                   0.040              99.5 %
               fp8_e4m3                          0.91                   0.122              97.9 %
               prompt in chunks of 64 instead    0.0001                 0.00001            100 %
    bfloat16   int8                              0.78                   0.150              96.4 %
               fp8_e4m3                          1.06                   0.187              94.8 %
               prompt in chunks of 64 instead    0.75                   0.129              97.9 %
    bfloat16,  int8                              1.30                   0.199              96.9 %
    file       fp8_e4m3                          1.28                   0.237              96.4 %

So int8 is the better of the two, and in a bfloat16 engine hardly more than what bfloat16 does to itself. With weights in a file's
blocks (`engine.weights`) rows are rounded to 8 bits anyway, and a change before that moves some of the steps. Smaller groups gain
little: int8 in float32 by 16 values, 0.028 root mean square for a fifth more bytes. `LOGIT_BUDGETS` are the figures with a margin
of about a half; a test marked `model` holds the real model to them.

Exact numerics promise bits, and are refused. This module knows neither links nor digests.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import HandoffError, HandshakeRefused
from common.types import KVLayout
from kvtransfer.float_bits import BITS, E4M3_LARGEST, E4M3_NAN, LARGEST, Floats, from_e4m3, from_float32, to_e4m3, to_float32

SCALE_BYTES = 4
_SCALE = np.dtype("<f4")


class WireDtype(enum.StrEnum):
    INT8 = "int8"
    FP8_E4M3 = "fp8_e4m3"


@dataclass(frozen=True, slots=True)
class LogitBudget:
    """What the wire may do to the next token's logits on the default model."""

    largest_difference: float
    rms_difference: float
    same_first_choice: float  # share of positions


LOGIT_BUDGETS: Mapping[tuple[WireDtype, str], LogitBudget] = {
    (WireDtype.INT8, "float32"): LogitBudget(0.4, 0.06, 0.98),
    (WireDtype.FP8_E4M3, "float32"): LogitBudget(1.4, 0.18, 0.96),
    (WireDtype.INT8, "bfloat16"): LogitBudget(1.2, 0.22, 0.94),
    (WireDtype.FP8_E4M3, "bfloat16"): LogitBudget(1.6, 0.28, 0.92),
    (WireDtype.INT8, "bfloat16, file"): LogitBudget(2.0, 0.3, 0.94),
    (WireDtype.FP8_E4M3, "bfloat16, file"): LogitBudget(2.0, 0.36, 0.92),
}
"""By wire, and by the engine: the dtype of its KV, and that its weights are in the blocks of their file if they are."""

_LARGEST_CODE: Mapping[WireDtype, float] = {WireDtype.INT8: 127.0, WireDtype.FP8_E4M3: E4M3_LARGEST}


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How blocks of one layout travel. Raises HandshakeRefused if they cannot, with the field as `param`."""

    dtype: WireDtype
    layout: KVLayout
    group_values: int = 0  # 0 = a whole row

    def __post_init__(self) -> None:
        if self.layout.dtype not in BITS:
            raise HandshakeRefused(f"there is no conversion for KV of dtype {self.layout.dtype!r}", param="dtype")
        if self.layout.exact:
            raise HandshakeRefused(f"exact KV does not travel as {self.dtype}: it would not arrive as it was", param="exact")
        if self.group_values < 0 or self.layout.head_dim % (self.group_values or 1):
            raise HandshakeRefused(
                f"rows of {self.layout.head_dim} values have no groups of {self.group_values}", param="group_values"
            )

    @property
    def row_groups(self) -> int:
        return self.layout.head_dim // self.group_values if self.group_values else 1

    @property
    def layer_rows(self) -> int:
        return self.layout.num_kv_heads * 2 * self.layout.block_tokens

    @property
    def layer_bytes(self) -> int:
        """One layer of an encoded block."""
        return self.layer_rows * (self.layout.head_dim + SCALE_BYTES * self.row_groups)

    @property
    def block_bytes(self) -> int:
        return self.layout.num_layers * self.layer_bytes


def encode(block: memoryview, wire: WireFormat, *, num_tokens: int | None = None) -> bytes:
    """Encodes any number of whole layers of one block, of whose tokens the first `num_tokens` mean something; None = all.

    Raises HandoffError for NaN and infinity among those, and for bytes that are no whole layers.
    """
    layout = wire.layout
    num_layers = _whole_layers(block.nbytes, layout.block_bytes // layout.num_layers, layout)
    filled = layout.block_tokens if num_tokens is None else num_tokens
    if not 0 < filled <= layout.block_tokens:
        raise HandoffError(f"{filled} tokens of a block that holds {layout.block_tokens}", param="num_tokens")
    bits = np.frombuffer(block, BITS[layout.dtype]).reshape(-1, layout.block_tokens, layout.head_dim)
    values = np.zeros(bits.shape, np.float32)
    values[:, :filled] = to_float32(bits[:, :filled], layout.dtype)
    groups = values.reshape(-1, layout.head_dim // wire.row_groups)
    largest = np.abs(groups).max(axis=1)
    if not np.isfinite(largest).all():
        raise HandoffError("the KV holds a value that is not a finite number", param="dtype")
    scales = _scales(largest, _LARGEST_CODE[wire.dtype])
    scaled: Floats = np.divide(groups, np.where(scales == 0, np.float32(1), scales)[:, None], dtype=np.float32)
    encoded = np.empty((num_layers, wire.layer_bytes), np.uint8)
    code_bytes = wire.layer_rows * layout.head_dim
    encoded[:, :code_bytes] = _to_codes(scaled, wire.dtype).reshape(num_layers, -1)
    encoded[:, code_bytes:] = scales.view(np.uint8).reshape(num_layers, -1)
    return encoded.tobytes()


def decode(data: bytes | memoryview, wire: WireFormat) -> bytes:
    """The layers of the block, in its dtype. Raises HandoffError for what `encode` cannot have made."""
    layout = wire.layout
    num_layers = _whole_layers(memoryview(data).nbytes, wire.layer_bytes, layout)
    encoded = np.frombuffer(data, np.uint8).reshape(num_layers, wire.layer_bytes)
    code_bytes = wire.layer_rows * layout.head_dim
    codes = encoded[:, :code_bytes].reshape(-1, layout.head_dim // wire.row_groups)
    scales = np.ascontiguousarray(encoded[:, code_bytes:]).view(_SCALE).reshape(-1, 1)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise HandoffError("a scale of encoded KV is not a finite number from 0 on", param="scale")
    with np.errstate(over="ignore"):
        values = _from_codes(codes, wire.dtype) * scales
    # A scale was rounded up: the largest values of the dtype may come out a last bit too large for it.
    limit = np.float32(LARGEST[layout.dtype])
    return from_float32(np.clip(values, -limit, limit), layout.dtype).tobytes()


def _whole_layers(size_bytes: int, layer_bytes: int, layout: KVLayout) -> int:
    num_layers, rest = divmod(size_bytes, layer_bytes)
    if rest or not 1 <= num_layers <= layout.num_layers:
        raise HandoffError(
            f"{size_bytes} bytes are not 1 to {layout.num_layers} layers of {layer_bytes} bytes", param="size_bytes"
        )
    return num_layers


def _scales(largest: Floats, largest_code: float) -> Floats:
    """Rounded up, so that no code has to be cut off, however small the values are."""
    wanted = largest.astype(np.float64) / largest_code
    scales = wanted.astype(np.float32)
    return np.where(scales < wanted, np.nextafter(scales, np.float32(np.inf)), scales)


def _to_codes(scaled: Floats, dtype: WireDtype) -> npt.NDArray[Any]:
    if dtype is WireDtype.INT8:
        # Rounding in the division may take the largest to just beyond 127, never to 127.5.
        return np.rint(scaled).astype(np.int8).view(np.uint8)
    return to_e4m3(scaled)


def _from_codes(codes: npt.NDArray[np.uint8], dtype: WireDtype) -> Floats:
    if dtype is WireDtype.INT8:
        if (codes == 0x80).any():
            raise HandoffError("encoded KV holds -128, which is no code", param="code")
        return codes.view(np.int8).astype(np.float32)
    if ((codes & 0x7F) == E4M3_NAN).any():
        raise HandoffError("encoded KV holds NaN", param="code")
    return from_e4m3(codes)
