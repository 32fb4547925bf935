"""What travels on a data link after authentication: a fixed header; in BLOCKS and WRITTEN a table of pieces; then their bytes.

    0      4         6      8       24      28       32
    | PDKV | version | kind | nonce | count | amount | count x descriptor | payload: the pieces, in the order of the table |

    descriptor   | logical block 4 | first layer 2 | number of layers 2 | digest 16 |        little-endian, without padding

    kind      from      count    amount
    OPEN      prefill   0        0                            may I?
    GRANT     decode    0        first credit, in bytes       one GRANT or REFUSE for each OPEN
    REFUSE    decode    0        the reason
    BLOCKS    prefill   pieces   bytes of payload             the sum of what the table says
    WRITTEN   prefill   pieces   0                            they are in your pool
    CREDIT    decode    0        bytes                        verified: so much more may be written
    PULSE     both      0        0                            this end lives and is still at it
    CLOSE     prefill   0        0                            nothing more

Neither addresses nor pool block numbers travel, so a frame cannot point outside its ticket. The header is checked before the
table is read, and the table before a byte of payload is; whatever does not fit ends the link.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from common.errors import TransferBroken
from kvtransfer.digest import DIGEST_BYTES, NONCE_BYTES
from kvtransfer.transports.base import PieceName, Written

MAGIC = b"PDKV"
VERSION = 2
MAX_PIECES = 1024  # in one frame
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024  # of one frame; a piece that is larger by itself travels alone
_HEADER = struct.Struct(f"<4sHH{NONCE_BYTES}sII")
_DESCRIPTOR = struct.Struct(f"<IHH{DIGEST_BYTES}s")
HEADER_BYTES = _HEADER.size
DESCRIPTOR_BYTES = _DESCRIPTOR.size
MAX_TABLE_BYTES = MAX_PIECES * DESCRIPTOR_BYTES


class FrameKind(enum.IntEnum):
    OPEN = 1
    GRANT = 2
    REFUSE = 3
    BLOCKS = 4
    WRITTEN = 5
    CLOSE = 6
    CREDIT = 7
    PULSE = 8


_WITH_TABLE = frozenset({FrameKind.BLOCKS, FrameKind.WRITTEN})
_WITH_AMOUNT = frozenset({FrameKind.BLOCKS, FrameKind.GRANT, FrameKind.REFUSE, FrameKind.CREDIT})
_KINDS = {int(kind): kind for kind in FrameKind}


@dataclass(frozen=True, slots=True)
class Frame:
    """A header."""

    kind: FrameKind
    nonce: bytes
    count: int = 0
    amount: int = 0

    def encode(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.kind, self.nonce, self.count, self.amount)

    @property
    def table_bytes(self) -> int:
        return self.count * DESCRIPTOR_BYTES


def encode_table(names: Iterable[PieceName], digests: Iterable[bytes]) -> bytes:
    return b"".join([_DESCRIPTOR.pack(*name, digest) for name, digest in zip(names, digests, strict=True)])


def descriptors_in(table: bytes | bytearray | memoryview) -> Iterator[tuple[int, int, int, bytes]]:
    """Logical block, first layer, number of layers and digest of each."""
    return _DESCRIPTOR.iter_unpack(table)


def decode_header(header: bytes | bytearray | memoryview, *, block_bytes: int) -> Frame:
    """Raises TransferBroken for anything that a peer of this version with blocks of this size would not send."""
    magic, version, kind, nonce, count, amount = _HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise TransferBroken("a frame does not begin as frames of this version do")
    known = _KINDS.get(kind)
    if known is None:
        raise TransferBroken(f"a frame of the unknown kind {kind}")
    if not (0 < count <= MAX_PIECES if known in _WITH_TABLE else count == 0):
        raise TransferBroken(f"a {known.name} frame announces {count} pieces")
    if amount and known not in _WITH_AMOUNT:
        raise TransferBroken(f"a {known.name} frame states an amount")
    if known is FrameKind.BLOCKS and not 0 < amount <= max(MAX_PAYLOAD_BYTES, block_bytes):
        raise TransferBroken(f"a {known.name} frame announces {amount} bytes of payload")
    return Frame(known, nonce, count, amount)


def decode_table(frame: Frame, table: bytes | bytearray | memoryview, num_layers: int, layer_bytes: int) -> list[Written]:
    """The pieces that `frame` announces, of blocks with so many layers of so many bytes on the wire. Raises TransferBroken if
    they cannot be of such blocks, or are not what it said."""
    pieces = []
    layers = 0
    for logical_block, first_layer, of_them, digest in descriptors_in(table):
        if of_them == 0 or first_layer + of_them > num_layers:
            raise TransferBroken(f"a piece of the layers from {first_layer}, {of_them} of them, is not in a block")
        pieces.append(Written(PieceName(logical_block, first_layer, of_them), digest, None))
        layers += of_them
    if len(pieces) != frame.count:
        raise TransferBroken(f"a table of {len(pieces)} pieces where {frame.count} were announced")
    if frame.kind is FrameKind.BLOCKS and layers * layer_bytes != frame.amount:
        raise TransferBroken(f"{layers} layers do not have {frame.amount} bytes")
    return pieces
