"""Headers survive the trip; everything else is refused before a byte of payload is read."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from common.errors import TransferBroken
from kvtransfer.frames import HEADER_BYTES, Frame, FrameKind, decode

BLOCK_BYTES = 2048


@given(
    kind=st.sampled_from(FrameKind),
    nonce=st.binary(min_size=16, max_size=16),
    logical_block=st.integers(0, 2**32 - 1),
    digest=st.binary(min_size=16, max_size=16),
)
def test_headers_survive_the_trip(kind: FrameKind, nonce: bytes, logical_block: int, digest: bytes) -> None:
    frame = Frame(kind, nonce, logical_block, BLOCK_BYTES if kind is FrameKind.BLOCK else 0, digest)
    assert len(frame.encode()) == HEADER_BYTES
    assert decode(frame.encode(), block_bytes=BLOCK_BYTES) == frame


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(TransferBroken):
        decode(noise, block_bytes=BLOCK_BYTES)


@pytest.mark.parametrize("payload_bytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES + 1, 2**32 - 1])
def test_a_payload_that_is_not_one_block_is_refused(payload_bytes: int) -> None:
    with pytest.raises(TransferBroken):
        decode(Frame(FrameKind.BLOCK, bytes(16), 0, payload_bytes).encode(), block_bytes=BLOCK_BYTES)


@pytest.mark.parametrize("kind", [kind for kind in FrameKind if kind is not FrameKind.BLOCK])
def test_other_frames_have_no_payload(kind: FrameKind) -> None:
    with pytest.raises(TransferBroken):
        decode(Frame(kind, bytes(16), 0, 1).encode(), block_bytes=BLOCK_BYTES)


@pytest.mark.parametrize("position", range(8))
def test_magic_version_and_kind_must_be_right(position: int) -> None:
    header = bytearray(Frame(FrameKind.OPEN, bytes(16)).encode())
    header[position] ^= 0x80
    with pytest.raises(TransferBroken):
        decode(header, block_bytes=BLOCK_BYTES)
