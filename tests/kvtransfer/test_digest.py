from __future__ import annotations

import pytest

from kvtransfer.digest import DIGEST_BYTES, block_digest_of, piece_digest

PIECE = bytes(range(256)) * 8
NONCE = b"0123456789abcdef"


def test_the_digest_depends_on_bytes_nonce_and_place() -> None:
    reference = piece_digest(memoryview(PIECE), NONCE, 5, 2, 3)
    assert len(reference) == DIGEST_BYTES
    assert piece_digest(memoryview(bytearray(PIECE)), NONCE, 5, 2, 3) == reference
    assert piece_digest(memoryview(PIECE), NONCE[::-1], 5, 2, 3) != reference
    assert piece_digest(memoryview(PIECE), NONCE, 6, 2, 3) != reference
    assert piece_digest(memoryview(PIECE), NONCE, 5, 3, 3) != reference
    assert piece_digest(memoryview(PIECE), NONCE, 5, 2, 4) != reference


@pytest.mark.parametrize("position", range(0, len(PIECE), 61))
def test_every_bit_counts(position: int) -> None:
    reference = piece_digest(memoryview(PIECE), NONCE, 0, 0, 1)
    for bit in range(8):
        flipped = bytearray(PIECE)
        flipped[position] ^= 1 << bit
        assert piece_digest(memoryview(flipped), NONCE, 0, 0, 1) != reference


@pytest.mark.parametrize("size_bytes", [1024 * 1024 - 1, 1024 * 1024, 1024 * 1024 + 1, 3 * 1024 * 1024])
def test_in_a_large_piece_too(size_bytes: int) -> None:
    large = bytearray((PIECE * (size_bytes // len(PIECE) + 1))[:size_bytes])
    reference = piece_digest(memoryview(large), NONCE, 0, 0, 1)
    for position in (0, size_bytes // 2, size_bytes - 1):
        large[position] ^= 1
        assert piece_digest(memoryview(large), NONCE, 0, 0, 1) != reference
        large[position] ^= 1
    assert piece_digest(memoryview(large), NONCE, 0, 0, 1) == reference


def test_the_sum_of_a_block_depends_on_each_piece_and_on_how_it_was_cut() -> None:
    first, second = bytes(16), bytes(range(16))
    reference = block_digest_of([(0, 2, first), (2, 1, second)])
    assert len(reference) == DIGEST_BYTES
    others = [
        [(0, 2, second), (2, 1, first)],
        [(0, 1, first), (1, 2, second)],
        [(0, 2, first), (2, 1, first)],
        [(0, 2, first), (2, 2, second)],
        [(0, 1, first), (1, 1, bytes(16)), (2, 1, second)],
    ]
    assert block_digest_of([(0, 3, second)]) == second  # its own place is in it
    assert len({reference, *(block_digest_of(pieces) for pieces in others)}) == 1 + len(others)


def test_known_values_so_that_two_releases_agree() -> None:
    assert piece_digest(memoryview(PIECE), NONCE, 5, 2, 3).hex() == "e27c20ddc9b009287550fba10f0e942a"
    assert piece_digest(memoryview(PIECE * 512), NONCE, 5, 2, 3).hex() == "84c718f5c1c13e38bbe25d5f76d46dec"
    assert block_digest_of([(0, 2, bytes(16)), (2, 1, NONCE)]).hex() == "1255e66026345577fb474a06a06c4925"
