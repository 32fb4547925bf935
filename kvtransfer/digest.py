"""What KV must look like on arrival: 16 bytes for each piece, always computed, over every byte; and one sum for each block.

    piece = xxh3_128( tag | nonce | logical block, first layer, number of layers | content )
    content = xxh3_128(the piece's bytes), or xxh3_128(their number | their lane sums)
    block = the piece, if it is one; else
            xxh3_128( tag | first layer, number of layers, piece | ... )      its pieces, from the first layer to the last

The nonce and the piece's place are inside, so that bytes of another request, of an earlier attempt, or of another place in the
same prompt do not pass for the right ones. The seal states the sums of blocks: both sides add up the pieces that they know.

Lane sums (`common.lane_sums`) are what a GPU makes while it copies: 1/128 of the bytes come to the host. Which content it was is
in the tag, so that a digest of one kind is never one of the other; both ends of a link use the kind that its transport names.

It protects against accident: flipped bits, torn or late writes, swapped blocks, races between a writer and the memory's next
owner. It is not a MAC: xxh3 does not resist a forger. That bytes come from the right worker follows from the authenticated link
and from the MAC on the ticket.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Protocol

from xxhash import xxh3_128, xxh3_128_digest

DIGEST_BYTES = 16
NONCE_BYTES = 16
_LARGE_BYTES = 1024 * 1024
_pack_place = struct.Struct(f"<12s{NONCE_BYTES}sIHH").pack
_pack_part = struct.Struct(f"<HH{DIGEST_BYTES}s").pack
_BLOCK_TAG = b"pdserve-kv-block-2"


class DeviceContent(Protocol):
    """A piece that cannot be read here (`kvtransfer.device`)."""

    def content(self) -> bytes: ...


class DigestKind(enum.Enum):
    """How a piece's bytes are read; the value is the tag of its digests."""

    BYTES = b"pdserve-kv-2"
    LANES = b"pdserve-kv-L"


def piece_digest(
    piece: memoryview | DeviceContent,
    nonce: bytes,
    logical_block: int,
    first_layer: int,
    num_layers: int,
    kind: DigestKind = DigestKind.BYTES,
) -> bytes:
    """The digest of a piece of the transfer `nonce`. Lets go of the GIL while it reads a large one. Of a piece on a device, what
    the device says of its content is taken for its bytes."""
    if not isinstance(piece, memoryview):
        return _bound(DigestKind.BYTES, xxh3_128_digest(piece.content()), nonce, logical_block, first_layer, num_layers)
    if kind is DigestKind.LANES:
        from common.lane_sums import lane_sums

        sums = lane_sums(piece).data.cast("B")
        return piece_digest_of_sums(sums, piece.nbytes, nonce, logical_block, first_layer, num_layers)
    if piece.nbytes < _LARGE_BYTES:
        content = xxh3_128_digest(piece)
    else:
        reading = xxh3_128()
        reading.update(piece)
        content = reading.digest()
    return _bound(kind, content, nonce, logical_block, first_layer, num_layers)


def piece_digest_of_sums(
    sums: memoryview, num_bytes: int, nonce: bytes, logical_block: int, first_layer: int, num_layers: int
) -> bytes:
    """As `piece_digest` by lanes, of a piece of `num_bytes` whose sums were made elsewhere: chunk by chunk, 32 bytes each."""
    reading = xxh3_128(num_bytes.to_bytes(8, "little"))
    reading.update(sums)
    return _bound(DigestKind.LANES, reading.digest(), nonce, logical_block, first_layer, num_layers)


def _bound(kind: DigestKind, content: bytes, nonce: bytes, logical_block: int, first_layer: int, num_layers: int) -> bytes:
    place = _pack_place(kind.value, nonce, logical_block, first_layer, num_layers)
    digest: bytes = xxh3_128_digest(place + content)
    return digest


def block_digest_of(pieces: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The sum over a block's pieces (first layer, number of layers, digest), which must come sorted and cover the block."""
    if len(pieces) == 1:
        return pieces[0][2]
    digest: bytes = xxh3_128_digest(b"".join([_BLOCK_TAG, *[_pack_part(*piece) for piece in pieces]]))
    return digest
