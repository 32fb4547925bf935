"""What travels on a data link after authentication: a fixed header; for pieces a table of them; in BLOCKS then their bytes.

    0      4         6      8       24      28       32
    | PDKV | version | kind | nonce | count | amount | count x descriptor | payload: the pieces, in the order of the table |

    descriptor   | logical block 4 | first layer 2 | number of layers 2 | digest 16 |        little-endian, without padding
    of READY     | logical block 4 | first layer 2 | number of layers 2 | place 8 |

    kind      from      count    amount
    OPEN      prefill   0        0                            may I?
    GRANT     decode    0        first credit, in bytes       one GRANT or REFUSE for each OPEN
    REFUSE    decode    0        the reason
    BLOCKS    prefill   pieces   bytes of payload             the sum of what the table says
    READY     prefill   pieces   0                            they are in my pool, at these places in it: fetch them
    TAKEN     decode    0        pieces                       so many that were ready are not read any more
    WRITTEN   prefill   pieces   0                            they are in your pool; or, after READY, are what was to be fetched
    CREDIT    decode    0        bytes                        verified: so much more may be written
    PULSE     both      0        0                            this end lives and is still at it
    CLOSE     prefill   0        0                            nothing more

Where a piece goes does not travel, neither as an address nor as a block of the pool, so a frame cannot point outside its ticket;
where one is fetched from does, as an offset into the sender's own pool. The header is checked before the table is read, and the
table before a byte of payload is; whatever does not fit ends the link.
"""

from __future__ import annotations

import enum
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from common.errors import TransferBroken
from kvtransfer.digest import DIGEST_BYTES, NONCE_BYTES
from kvtransfer.transports.base import PieceName, Written

MAGIC = b"PDKV"
VERSION = 3
MAX_PIECES = 1024  # in one frame
MAX_PAYLOAD_BYTES = 16 * 1024 * 1024  # of one frame; a piece that is larger by itself travels alone
_HEADER = struct.Struct(f"<4sHH{NONCE_BYTES}sII")
_DESCRIPTOR = struct.Struct(f"<IHH{DIGEST_BYTES}s")
_PLACE = struct.Struct("<IHHQ")
_NAME, _WORD = struct.Struct("<IHH"), struct.Struct("<Q")
HEADER_BYTES = _HEADER.size
DESCRIPTOR_BYTES = _DESCRIPTOR.size
PLACE_BYTES = _PLACE.size
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
    READY = 9
    TAKEN = 10


_WITH_TABLE = frozenset({FrameKind.BLOCKS, FrameKind.WRITTEN, FrameKind.READY})
_WITH_AMOUNT = frozenset({FrameKind.BLOCKS, FrameKind.GRANT, FrameKind.REFUSE, FrameKind.CREDIT, FrameKind.TAKEN})
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
        return self.count * (PLACE_BYTES if self.kind is FrameKind.READY else DESCRIPTOR_BYTES)


def encode_table(names: Iterable[PieceName], digests: Iterable[bytes]) -> bytes:
    return b"".join([_DESCRIPTOR.pack(*name, digest) for name, digest in zip(names, digests, strict=True)])


def encode_places(logical_blocks: Sequence[int], first_layer: int, num_layers: int, places: Sequence[int]) -> bytes:
    """Descriptors of READY for the same layers of many blocks, by columns, of which one has two of 64 bits. Raises OverflowError
    or struct.error for what has no room."""
    (layers,) = _WORD.unpack(_NAME.pack(0, first_layer, num_layers))
    columns = array("Q", bytes(PLACE_BYTES * len(logical_blocks)))
    columns[0::2] = array("Q", [layers + block for block in array("I", logical_blocks)])
    columns[1::2] = array("Q", places)
    if sys.byteorder != "little":
        columns.byteswap()
    return columns.tobytes()


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
    """The pieces that `frame` announces with their digests, of blocks with so many layers of so many bytes on the wire. Raises
    TransferBroken if they cannot be of such blocks, or are not what it said."""
    pieces = []
    layers = 0
    for logical_block, first_layer, of_them, digest in descriptors_in(table):
        pieces.append(Written(_checked(logical_block, first_layer, of_them, num_layers), digest, None))
        layers += of_them
    if len(pieces) != frame.count:
        raise TransferBroken(f"a table of {len(pieces)} pieces where {frame.count} were announced")
    if frame.kind is FrameKind.BLOCKS and layers * layer_bytes != frame.amount:
        raise TransferBroken(f"{layers} layers do not have {frame.amount} bytes")
    return pieces


def decode_places(table: bytes | bytearray | memoryview, num_layers: int) -> list[tuple[PieceName, int]]:
    """The pieces of a READY, and where the sender says that they lie in its pool. Raises TransferBroken as `decode_table`."""
    rows = _PLACE.iter_unpack(table)
    return [(_checked(block, first_layer, of_them, num_layers), place) for block, first_layer, of_them, place in rows]


def _checked(logical_block: int, first_layer: int, of_them: int, num_layers: int) -> PieceName:
    if of_them == 0 or first_layer + of_them > num_layers:
        raise TransferBroken(f"a piece of the layers from {first_layer}, {of_them} of them, is not in a block")
    return PieceName(logical_block, first_layer, of_them)
