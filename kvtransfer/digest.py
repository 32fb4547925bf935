"""What a block must look like on arrival: one 16-byte digest per block, always computed, over every byte.

    digest = xxh3_128( tag | nonce | logical block | xxh3_128(the block's bytes) )

The nonce and the logical block number are inside, so that a block of another request, of an earlier attempt, or of another place
in the same prompt does not pass for the right one. It protects against accident: flipped bits, torn or late writes, swapped
blocks, races between a writer and the memory's next owner. It is not a MAC: xxh3 does not resist a forger. That bytes come from
the right worker follows from the authenticated link and from the MAC on the ticket.
"""

from __future__ import annotations

import struct

import xxhash

DIGEST_BYTES = 16
NONCE_BYTES = 16
_BOUND = struct.Struct("<12s16sI")
_TAG = b"pdserve-kv-1"


def block_digest(block: memoryview, nonce: bytes, logical_block: int) -> bytes:
    """The digest of `block` as logical block `logical_block` of the transfer `nonce`. Releases the GIL on large blocks."""
    content: bytes = xxhash.xxh3_128_digest(block)
    bound: bytes = xxhash.xxh3_128_digest(_BOUND.pack(_TAG, nonce, logical_block) + content)
    return bound
