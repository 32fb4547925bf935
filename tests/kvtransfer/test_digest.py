from __future__ import annotations

import pytest

from kvtransfer.digest import DIGEST_BYTES, block_digest

BLOCK = bytes(range(256)) * 8
NONCE = b"0123456789abcdef"


def test_the_digest_depends_on_bytes_nonce_and_place() -> None:
    reference = block_digest(memoryview(BLOCK), NONCE, 5)
    assert len(reference) == DIGEST_BYTES
    assert block_digest(memoryview(bytearray(BLOCK)), NONCE, 5) == reference
    assert block_digest(memoryview(BLOCK), NONCE[::-1], 5) != reference
    assert block_digest(memoryview(BLOCK), NONCE, 6) != reference


@pytest.mark.parametrize("position", range(0, len(BLOCK), 61))
def test_every_bit_counts(position: int) -> None:
    reference = block_digest(memoryview(BLOCK), NONCE, 0)
    for bit in range(8):
        flipped = bytearray(BLOCK)
        flipped[position] ^= 1 << bit
        assert block_digest(memoryview(flipped), NONCE, 0) != reference


def test_known_value_so_that_two_releases_agree() -> None:
    assert block_digest(memoryview(BLOCK), NONCE, 5).hex() == "c3548227c4d3eab0ccf32ecbf1128ec4"
