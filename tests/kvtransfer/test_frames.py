"""Frames survive the trip; everything else is refused before a byte of payload is read."""

from __future__ import annotations

import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given

from common.errors import TransferBroken
from common.types import KVLayout
from kvtransfer.frames import (
    DESCRIPTOR_BYTES,
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_PIECES,
    PLACE_BYTES,
    Frame,
    FrameKind,
    decode_header,
    decode_places,
    decode_table,
    encode_places,
    encode_table,
)
from kvtransfer.transports.base import PieceName, Written

LAYOUT = KVLayout("model", "tokenizer", 6, 2, 32, 16, "float32", True)
LAYER_BYTES = LAYOUT.block_bytes // 6
WITH_DIGESTS = (FrameKind.BLOCKS, FrameKind.WRITTEN)
WITH_TABLE = (*WITH_DIGESTS, FrameKind.READY)
names = st.integers(0, 5).flatmap(
    lambda first: st.builds(PieceName, st.integers(0, 2**32 - 1), st.just(first), st.integers(1, 6 - first))
)


def decode(header: bytes | bytearray) -> Frame:
    return decode_header(header, block_bytes=LAYOUT.block_bytes)


def test_the_form_on_the_wire() -> None:
    assert (HEADER_BYTES, DESCRIPTOR_BYTES, PLACE_BYTES) == (32, 24, 16)
    expected = b"PDKV" + struct.pack("<HH", 3, 4) + bytes(range(16)) + struct.pack("<II", 1, LAYER_BYTES)
    assert Frame(FrameKind.BLOCKS, bytes(range(16)), 1, LAYER_BYTES).encode() == expected
    assert encode_table([PieceName(7, 2, 3)], [b"d" * 16]) == struct.pack("<IHH", 7, 2, 3) + b"d" * 16
    placed = struct.pack("<IHHQ", 7, 2, 3, 1 << 40) + struct.pack("<IHHQ", 2**32 - 1, 2, 3, 5)
    assert encode_places([7, 2**32 - 1], 2, 3, [1 << 40, 5]) == placed


@given(
    kind=st.sampled_from(FrameKind),
    nonce=st.binary(min_size=16, max_size=16),
    count=st.integers(1, MAX_PIECES),
    amount=st.integers(1, MAX_PAYLOAD_BYTES),
)
def test_headers_survive_the_trip(kind: FrameKind, nonce: bytes, count: int, amount: int) -> None:
    with_amount = kind in (FrameKind.BLOCKS, FrameKind.GRANT, FrameKind.REFUSE, FrameKind.CREDIT, FrameKind.TAKEN)
    frame = Frame(kind, nonce, count if kind in WITH_TABLE else 0, amount if with_amount else 0)
    assert decode(frame.encode()) == frame


@given(st.lists(st.tuples(names, st.binary(min_size=16, max_size=16)), min_size=1, max_size=20), st.sampled_from(WITH_DIGESTS))
def test_tables_survive_the_trip(pieces: list[tuple[PieceName, bytes]], kind: FrameKind) -> None:
    payload_bytes = sum(name.num_layers for name, _ in pieces) * LAYER_BYTES
    frame = Frame(kind, bytes(16), len(pieces), payload_bytes if kind is FrameKind.BLOCKS else 0)
    table = encode_table([name for name, _ in pieces], [digest for _, digest in pieces])
    assert len(table) == frame.table_bytes
    assert decode_table(frame, table, LAYOUT.num_layers, LAYER_BYTES) == [Written(name, digest, None) for name, digest in pieces]


@given(st.lists(st.tuples(names, st.integers(0, 2**64 - 1)), min_size=1, max_size=20))
def test_places_survive_the_trip(placed: list[tuple[PieceName, int]]) -> None:
    frame = Frame(FrameKind.READY, bytes(16), len(placed))
    table = b"".join([encode_places([block], first, number, [place]) for (block, first, number), place in placed])
    assert len(table) == frame.table_bytes
    assert decode_places(table, LAYOUT.num_layers) == placed


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(TransferBroken):
        decode(noise)


@pytest.mark.parametrize("position", range(8))
def test_magic_version_and_kind_must_be_right(position: int) -> None:
    header = bytearray(Frame(FrameKind.OPEN, bytes(16)).encode())
    header[position] ^= 0x80
    with pytest.raises(TransferBroken):
        decode(header)


@pytest.mark.parametrize("version", [0, 1, 2, 4, 0xFFFF])
def test_other_versions_are_refused(version: int) -> None:
    header = bytearray(Frame(FrameKind.OPEN, bytes(16)).encode())
    header[4:6] = struct.pack("<H", version)
    with pytest.raises(TransferBroken):
        decode(header)


@pytest.mark.parametrize("kind", WITH_TABLE)
@pytest.mark.parametrize("count", [0, MAX_PIECES + 1, 2**32 - 1])
def test_no_pieces_or_too_many_are_refused(kind: FrameKind, count: int) -> None:
    with pytest.raises(TransferBroken):
        decode(Frame(kind, bytes(16), count, LAYER_BYTES if kind is FrameKind.BLOCKS else 0).encode())


@pytest.mark.parametrize("kind", [kind for kind in FrameKind if kind not in WITH_TABLE])
def test_other_frames_have_no_pieces(kind: FrameKind) -> None:
    with pytest.raises(TransferBroken):
        decode(Frame(kind, bytes(16), 1).encode())


@pytest.mark.parametrize("kind", [FrameKind.OPEN, FrameKind.WRITTEN, FrameKind.CLOSE, FrameKind.PULSE])
def test_other_frames_have_no_amount(kind: FrameKind) -> None:
    with pytest.raises(TransferBroken):
        decode(Frame(kind, bytes(16), 1 if kind is FrameKind.WRITTEN else 0, 1).encode())


@pytest.mark.parametrize("payload_bytes", [0, MAX_PAYLOAD_BYTES + 1, 2**32 - 1])
def test_no_payload_or_too_much_is_refused(payload_bytes: int) -> None:
    with pytest.raises(TransferBroken):
        decode(Frame(FrameKind.BLOCKS, bytes(16), 1, payload_bytes).encode())


def test_a_block_that_is_larger_than_other_frames_may_travel_alone() -> None:
    frame = Frame(FrameKind.BLOCKS, bytes(16), 1, 3 * MAX_PAYLOAD_BYTES)
    assert decode_header(frame.encode(), block_bytes=3 * MAX_PAYLOAD_BYTES) == frame
    with pytest.raises(TransferBroken):
        decode_header(frame.encode(), block_bytes=3 * MAX_PAYLOAD_BYTES - 1)


@pytest.mark.parametrize("wrong_bytes", [-LAYER_BYTES, -1, 1, LAYER_BYTES])
def test_a_payload_that_is_not_the_sum_of_its_pieces_is_refused(wrong_bytes: int) -> None:
    table = encode_table([PieceName(0, 0, 2), PieceName(1, 3, 3)], [bytes(16)] * 2)
    decode_table(Frame(FrameKind.BLOCKS, bytes(16), 2, 5 * LAYER_BYTES), table, LAYOUT.num_layers, LAYER_BYTES)
    with pytest.raises(TransferBroken):
        decode_table(Frame(FrameKind.BLOCKS, bytes(16), 2, 5 * LAYER_BYTES + wrong_bytes), table, LAYOUT.num_layers, LAYER_BYTES)


@pytest.mark.parametrize(
    ("first_layer", "num_layers"), [(0, 0), (0, 7), (6, 1), (5, 2), (3, 0xFFFF), (0xFFFF, 1), (0xFFFF, 0xFFFF)]
)
@pytest.mark.parametrize("kind", WITH_DIGESTS)
def test_layers_outside_a_block_are_refused(kind: FrameKind, first_layer: int, num_layers: int) -> None:
    table = encode_table([PieceName(0, first_layer, num_layers)], [bytes(16)])
    amount = num_layers * LAYER_BYTES if kind is FrameKind.BLOCKS else 0
    with pytest.raises(TransferBroken):
        decode_table(Frame(kind, bytes(16), 1, amount), table, LAYOUT.num_layers, LAYER_BYTES)


def test_a_table_of_another_length_is_refused() -> None:
    table = encode_table([PieceName(0, 0, 6)], [bytes(16)])
    with pytest.raises(TransferBroken):
        decode_table(Frame(FrameKind.WRITTEN, bytes(16), 2), table, LAYOUT.num_layers, LAYER_BYTES)
