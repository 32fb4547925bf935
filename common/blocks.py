"""Block arithmetic and the hash chain that names the content of a block.

    tokens   |0 ....... 15|16 ...... 31|32 .. 36|
    blocks   |     0      |     1      |   2    |     num_blocks(37) == 3, num_full_blocks(37) == 2
    hashes   |     h0     |     h1     |   -    |     only full blocks have a name

`h(i) = sha256(tag, h(i-1), tokens of block i)`, and `h(-1) = sha256(tag, layout fingerprint, salt)`: a hash stands for the whole
prefix, computed by this model in this layout, in this tenant's partition. Router and workers share this one function.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

BlockHash = bytes
"""32 bytes."""

EXACT_TILE_TOKENS = 64
"""Exact attention walks over keys in tiles of so many tokens, or of one block, if that is longer."""

BlockKey = int
"""The first 60 bits of a block's hash: enough to guess where a block is, never enough to take its KV."""


def num_blocks(num_tokens: int, block_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens, the last one perhaps partly filled."""
    return -(-num_tokens // block_tokens)


def num_full_blocks(num_tokens: int, block_tokens: int) -> int:
    return num_tokens // block_tokens


def exact_tile_blocks(block_tokens: int) -> int:
    """Blocks of a tile of exact attention. Where tiles have equally many tokens, so have equal prompts equal bits."""
    return max(1, EXACT_TILE_TOKENS // block_tokens)


def root_hash(layout_fingerprint: bytes, salt: str) -> BlockHash:
    return hashlib.sha256(
        b"pdserve-root-v1" + struct.pack("<I", len(layout_fingerprint)) + layout_fingerprint + salt.encode()
    ).digest()


def next_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The name of the block that follows `parent` and holds `token_ids`."""
    return hashlib.sha256(b"pdserve-block-v1" + parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


def hash_chain(root: BlockHash, token_ids: Sequence[int], block_tokens: int) -> Iterable[BlockHash]:
    """The names of the full blocks of `token_ids`, in order, computed one at a time."""
    parent = root
    for start in range(0, num_full_blocks(len(token_ids), block_tokens) * block_tokens, block_tokens):
        parent = next_hash(parent, token_ids[start : start + block_tokens])
        yield parent


def block_key(block_hash: BlockHash) -> BlockKey:
    return int.from_bytes(block_hash[:8], "big") >> 4  # 60 bits: a Python int of 32 bytes, where 64 bits take 48
