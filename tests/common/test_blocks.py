"""The hash chain against its formula, written out once more by hand, and what it must keep apart."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.blocks import hash_chain, next_hash, num_blocks, num_full_blocks, root_hash

FINGERPRINT = bytes(range(32))
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(num_tokens=st.integers(0, 10_000), block_tokens=st.integers(1, 256))
def test_block_arithmetic_counts_what_counting_counts(num_tokens: int, block_tokens: int) -> None:
    starts = range(0, num_tokens, block_tokens)
    assert num_blocks(num_tokens, block_tokens) == len(starts)
    assert num_full_blocks(num_tokens, block_tokens) == sum(start + block_tokens <= num_tokens for start in starts)


@given(tokens=token_ids, block_tokens=st.integers(1, 20), salt=st.text(max_size=5))
def test_chain_equals_naive_recomputation(tokens: list[int], block_tokens: int, salt: str) -> None:
    parent = sha256(b"pdserve-root-v1\x20\0\0\0" + FINGERPRINT + salt.encode()).digest()
    assert root_hash(FINGERPRINT, salt) == parent
    expected = []
    while len(tokens) - block_tokens * len(expected) >= block_tokens:
        block = tokens[block_tokens * len(expected) :][:block_tokens]
        parent = sha256(b"pdserve-block-v1" + parent + b"".join(token.to_bytes(4, "little") for token in block)).digest()
        expected.append(parent)
    assert list(hash_chain(root_hash(FINGERPRINT, salt), tokens, block_tokens)) == expected


def test_a_hash_stands_for_the_whole_prefix() -> None:
    root = root_hash(FINGERPRINT, "")
    ours, theirs = (list(hash_chain(root, [first, *range(1, 64)], 16)) for first in (0, 99))
    assert not set(ours) & set(theirs)
    longer = list(hash_chain(root, [*range(64), 7, 7], 16))
    assert longer == ours


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((FINGERPRINT, "tenant-a"), (FINGERPRINT, "tenant-b")),
        ((FINGERPRINT, ""), (FINGERPRINT, "tenant-a")),
        ((FINGERPRINT, ""), (bytes(32), "")),
        ((FINGERPRINT[:31], "\x1f"), (FINGERPRINT, "")),  # the same bytes, cut elsewhere
    ],
)
def test_tenants_and_layouts_never_share_a_block(one: tuple[bytes, str], other: tuple[bytes, str]) -> None:
    tokens = list(range(32))
    assert not set(hash_chain(root_hash(*one), tokens, 16)) & set(hash_chain(root_hash(*other), tokens, 16))


def test_block_size_is_part_of_the_name_of_a_block() -> None:
    root = root_hash(FINGERPRINT, "")
    assert next_hash(root, range(16)) != next_hash(next_hash(root, range(8)), range(8, 16))
