"""Lane sums against their definition in whole numbers, and digests made of them against accidents."""

from __future__ import annotations

import random
import struct

import pytest

from common.engine.lane_sums import CHUNK_BYTES, KEY, LANES, lane_sums
from kvtransfer.digest import device_digest, piece_digest

NONCE = bytes(16)


def by_definition(content: bytes) -> list[list[int]]:
    sums = []
    for start in range(0, len(content), CHUNK_BYTES):
        words = struct.unpack("<1024I", content[start : start + CHUNK_BYTES].ljust(CHUNK_BYTES, b"\0"))
        lanes = []
        for lane in range(LANES):
            key = [int(word) for word in KEY[2 * lane :]]
            pairs = [((words[i] + key[i]) % 2**32) * ((words[i + 1] + key[i + 1]) % 2**32) for i in range(0, 1024, 2)]
            lanes.append(sum(pairs) % 2**64)
        sums.append(lanes)
    return sums


def digest(content: bytes) -> bytes:
    return device_digest(lane_sums(memoryview(content)).tobytes(), len(content), NONCE, 3, 0, 2)


@pytest.mark.parametrize("size", [0, 4, 4095, 4096, 4097, 12_000])
def test_sums_are_as_defined(size: int) -> None:
    content = random.Random(size).randbytes(size)
    assert lane_sums(memoryview(content)).tolist() == by_definition(content)
    assert lane_sums(memoryview(b"\xff" * size)).tolist() == by_definition(b"\xff" * size)


def test_the_key_never_changes() -> None:
    """Workers of two releases exchange KV: the same bytes have the same digest in each."""
    assert [int(KEY[0]), int(KEY[1029])] == [2120289800, 4117151288]
    assert digest(bytes(5000)).hex() == "91b379587509a11d308675c8684d9153"


def test_every_accident_is_seen() -> None:
    dice = random.Random(0)
    content = dice.randbytes(3 * CHUNK_BYTES)
    right = digest(content)
    flipped = bytearray(content)
    for _ in range(200):
        bit = dice.randrange(len(content) * 8)
        flipped[bit // 8] ^= 1 << bit % 8
        assert digest(bytes(flipped)) != right
        flipped[bit // 8] ^= 1 << bit % 8
    half, chunk = len(content) // 2, CHUNK_BYTES
    accidents = {
        "chunks swapped": content[chunk : 2 * chunk] + content[:chunk] + content[2 * chunk :],
        "words of a pair swapped": content[4:8] + content[:4] + content[8:],
        "pairs swapped": content[8:16] + content[:8] + content[16:],
        "half of it late": content[:half] + bytes(half),
        "nothing there": bytes(len(content)),
        "shorter": content[:-4],
        "longer by zeros": content + bytes(4),
    }
    for name, wrong in accidents.items():
        assert digest(wrong) != right, name


def test_kinds_places_and_lengths_are_told_apart() -> None:
    content = bytes(range(200))
    sums = lane_sums(memoryview(content)).tobytes()
    others = {
        piece_digest(memoryview(content), NONCE, 3, 0, 2),
        device_digest(sums, 204, NONCE, 3, 0, 2),
        device_digest(sums, 200, NONCE, 4, 0, 2),
        device_digest(sums, 200, b"1" * 16, 3, 0, 2),
    }
    assert len(others - {digest(content)}) == 4
