"""What travels on a data link after authentication: a fixed header, and after a BLOCK header exactly one block.

    0      4         6      8       24              28               32       48
    | PDKV | version | kind | nonce | logical block | payload length | digest |      little-endian
                                       (or, in REFUSE, the reason)

    prefill worker -> decode worker     OPEN (may I?), BLOCK (payload follows) or WRITTEN (it is in your pool), CLOSE (no more)
    decode worker -> prefill worker     GRANT or REFUSE, one for each OPEN

Neither addresses nor pool block numbers travel, so a frame cannot point outside its ticket. Everything is checked before a byte
of payload is read; whatever does not fit ends the link.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from common.errors import TicketRefused, TransferBroken
from kvtransfer.digest import DIGEST_BYTES, NONCE_BYTES

MAGIC = b"PDKV"
VERSION = 1
_HEADER = struct.Struct(f"<4sHH{NONCE_BYTES}sII{DIGEST_BYTES}s")
HEADER_BYTES = _HEADER.size
NO_DIGEST = bytes(DIGEST_BYTES)


class FrameKind(enum.IntEnum):
    OPEN = 1
    GRANT = 2
    REFUSE = 3
    BLOCK = 4
    WRITTEN = 5
    CLOSE = 6


class Refusal(enum.IntEnum):
    """Why a writer was not let in."""

    UNKNOWN = 1  # never minted here, or long over
    NOT_YOURS = 2  # minted for another worker or another incarnation of this one
    SPENT = 3  # admitted a writer before, or cancelled
    EXPIRED = 4

    def as_error(self) -> TicketRefused:
        return TicketRefused(f"the decode worker refused the ticket: {self.name.lower().replace('_', ' ')}", param="nonce")


@dataclass(frozen=True, slots=True)
class Frame:
    kind: FrameKind
    nonce: bytes
    logical_block: int = 0  # REFUSE: the reason
    payload_bytes: int = 0
    digest: bytes = NO_DIGEST

    def encode(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.kind, self.nonce, self.logical_block, self.payload_bytes, self.digest)


def decode(header: bytes | bytearray | memoryview, *, block_bytes: int) -> Frame:
    """Raises TransferBroken for anything that a peer of this version with blocks of this size would not send."""
    magic, version, kind, nonce, logical_block, payload_bytes, digest = _HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise TransferBroken("a frame does not begin as frames of this version do")
    try:
        known = FrameKind(kind)
    except ValueError as error:
        raise TransferBroken(f"a frame of the unknown kind {kind}") from error
    if payload_bytes != (block_bytes if known is FrameKind.BLOCK else 0):
        raise TransferBroken(f"a {known.name} frame announces {payload_bytes} bytes of payload")
    return Frame(known, nonce, logical_block, payload_bytes, digest)
