"""What KV must look like on arrival: 16 bytes for each piece, always computed, over every byte; and one sum for each block.

    piece = xxh3_128( tag | nonce | logical block, first layer, number of layers | content )
    content = xxh3_128(the piece's bytes); of a piece on a device xxh3_128(their number | their lane sums)
    block = the piece, if it is one; else
            xxh3_128( tag | first layer, number of layers, piece | ... )      its pieces, from the first layer to the last

The nonce and the piece's place are inside, so that bytes of another request, of an earlier attempt, or of another place in the
same prompt do not pass for the right ones. The seal states the sums of blocks: both sides add up the pieces that they know.

Lane sums are what a GPU makes while it copies (`kvtransfer.device`): 1/128 of the bytes come to the host. Which content it was is
in the tag, so that a digest of one kind is never one of the other. Who copies with `kvtransfer.native` gets the content of what
was copied with the copy.

It protects against accident: flipped bits, torn or late writes, swapped blocks, races between a writer and the memory's next
owner. It is not a MAC: xxh3 does not resist a forger. That bytes come from the right worker follows from the authenticated link
and from the MAC on the ticket.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

from xxhash import xxh3_128, xxh3_128_digest

DIGEST_BYTES = 16
NONCE_BYTES = 16
_LARGE_BYTES = 1024 * 1024
_pack_place = struct.Struct(f"<12s{NONCE_BYTES}sIHH").pack
_pack_part = struct.Struct(f"<HH{DIGEST_BYTES}s").pack
_HOST_TAG, _DEVICE_TAG, _BLOCK_TAG = b"pdserve-kv-2", b"pdserve-kv-L", b"pdserve-kv-block-2"


class DeviceContent(Protocol):
    """A piece that cannot be read here (`kvtransfer.device`)."""

    @property
    def nbytes(self) -> int: ...

    def content(self) -> bytes: ...


def piece_digest(piece: memoryview | DeviceContent, nonce: bytes, logical_block: int, first_layer: int, num_layers: int) -> bytes:
    """The digest of a piece of the transfer `nonce`. Lets go of the GIL while it reads a large one."""
    if not isinstance(piece, memoryview):
        return device_digest(piece.content(), piece.nbytes, nonce, logical_block, first_layer, num_layers)
    if piece.nbytes < _LARGE_BYTES:
        content = xxh3_128_digest(piece)
    else:
        reading = xxh3_128()
        reading.update(piece)
        content = reading.digest()
    return digest_of_content(content, nonce, logical_block, first_layer, num_layers)


def digest_of_content(content: bytes, nonce: bytes, logical_block: int, first_layer: int, num_layers: int) -> bytes:
    """As `piece_digest`, of a piece in host memory whose bytes were digested already."""
    return _bound(_HOST_TAG, content, nonce, logical_block, first_layer, num_layers)


def device_digest(sums: bytes, num_bytes: int, nonce: bytes, logical_block: int, first_layer: int, num_layers: int) -> bytes:
    """Of a piece of `num_bytes` on a device, from its lane sums."""
    reading = xxh3_128(num_bytes.to_bytes(8, "little"))
    reading.update(sums)
    return _bound(_DEVICE_TAG, reading.digest(), nonce, logical_block, first_layer, num_layers)


def _bound(tag: bytes, content: bytes, nonce: bytes, logical_block: int, first_layer: int, num_layers: int) -> bytes:
    digest: bytes = xxh3_128_digest(_pack_place(tag, nonce, logical_block, first_layer, num_layers) + content)
    return digest


def binding_of(nonce: bytes) -> bytes:
    """What stands before a piece's place and content in what its digest is taken of, for whoever takes it natively."""
    return _HOST_TAG + nonce


def block_digest_of(pieces: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The sum over a block's pieces (first layer, number of layers, digest), which must come sorted and cover the block."""
    if len(pieces) == 1:
        return pieces[0][2]
    digest: bytes = xxh3_128_digest(b"".join([_BLOCK_TAG, *[_pack_part(*piece) for piece in pieces]]))
    return digest
