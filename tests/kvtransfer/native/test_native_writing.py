"""A batch that the compiled library puts on a socket: frame by frame what a peer reads, however little it takes at a time,
and how a write ends that cannot go on."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from common.config import pdserve_home
from common.errors import TransferBroken
from common.native_build import COMPILERS, build_library, find_compiler
from kvtransfer.digest import piece_digest
from kvtransfer.frames import Frame, FrameKind
from kvtransfer.native import choice, writing
from kvtransfer.native.kernel import Outcome, Outlet, PieceKernel, check_kernel, packed_piece
from kvtransfer.native.writing import write_natively
from kvtransfer.spans import address_of
from kvtransfer.transports.base import Piece, PieceName
from kvtransfer.transports.sending import SocketSend

pytestmark = [
    pytest.mark.long,  # a compiler runs
    pytest.mark.skipif(find_compiler() is None, reason=f"none of {', '.join(COMPILERS)}"),
]
NONCE = b"n" * 16
PIECE_BYTES = 50_000
PATIENCE_MS = 60_000


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def compiled() -> PieceKernel:
    return PieceKernel(build_library(choice._SOURCE, pdserve_home() / "kernels", check_kernel))


class Pair:
    """A socket that takes little at a time, its far end, and the event that wakes who waits for it."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        self.far.settimeout(PATIENCE_MS / 1000)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.received = bytearray()
        self._reading = threading.Thread(target=self._read)

    def outlet(self, *, stall_ms: int = PATIENCE_MS, patience_ms: int = PATIENCE_MS) -> Outlet:
        return Outlet(self.near.fileno(), self.wake, stall_ms, patience_ms)

    def read(self) -> None:
        """From now on, to the end."""
        self._reading.start()

    def all(self) -> bytes:
        self.near.close()
        self._reading.join()
        return bytes(self.received)

    def close(self) -> None:
        self.near.close()
        self.far.close()
        os.close(self.wake)

    def _read(self) -> None:
        while part := self.far.recv(30_000):
            self.received += part


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


class Received(NamedTuple):
    kind: int
    names: list[PieceName]
    digests: list[bytes]
    payload: bytes


def frames_in(data: bytes) -> list[Received]:
    """Taken apart by hand."""
    frames = []
    while data:
        magic, version, kind, nonce, count, amount = struct.unpack_from("<4sHH16sII", data)
        assert (magic, version, nonce) == (b"PDKV", 3, NONCE)
        table = [struct.unpack_from("<IHH16s", data, 32 + 24 * index) for index in range(count)]
        start = 32 + 24 * count
        payload, data = data[start : start + amount], data[start + amount :]
        assert len(payload) == amount
        frames.append(Received(kind, [PieceName(*entry[:3]) for entry in table], [entry[3] for entry in table], payload))
    return frames


def pieces_of(memory: bytearray) -> list[Piece]:
    dice = random.Random(3)
    memory[:] = dice.randbytes(len(memory))
    count = len(memory) // PIECE_BYTES
    cut = memoryview(memory)
    return [
        Piece(PieceName(70_000 + index, index % 5, 1 + index), 0, cut[index * PIECE_BYTES : (index + 1) * PIECE_BYTES])
        for index in range(count)
    ]


def packed(pieces: list[Piece]) -> bytes:
    return b"".join(packed_piece(address_of(piece.source), 0, piece.source.nbytes, *piece.name) for piece in pieces)


def told(pieces: list[Piece]) -> tuple[bytes, list[int]]:
    return packed(pieces), [piece.source.nbytes for piece in pieces]


def header(kind: FrameKind = FrameKind.BLOCKS) -> bytes:
    return Frame(kind, NONCE).encode()


def test_a_peer_reads_frame_by_frame_what_was_pushed(compiled: PieceKernel, pair: Pair) -> None:
    pieces = pieces_of(bytearray(7 * PIECE_BYTES))
    pair.read()
    digests, outcome = compiled.write(packed(pieces), [1, 4, 6, 7], pair.outlet(), NONCE, header(), with_payload=True)
    assert outcome is Outcome.DONE
    assert digests == [piece_digest(piece.source, NONCE, *piece.name) for piece in pieces]
    frames = frames_in(pair.all())
    assert [frame.kind for frame in frames] == [FrameKind.BLOCKS] * 4
    assert [frame.names for frame in frames] == [
        [piece.name for piece in part] for part in (pieces[:1], pieces[1:4], pieces[4:6], pieces[6:])
    ]
    assert [digest for frame in frames for digest in frame.digests] == digests
    assert b"".join(frame.payload for frame in frames) == b"".join(bytes(piece.source) for piece in pieces)


@pytest.mark.parametrize("instructions", ["native", "x86-64", "x86-64-v3"])
def test_what_is_stated_has_no_payload(tmp_path: Path, pair: Pair, instructions: str) -> None:
    """And what will be read no more is digested to the same, also where there are other instructions for it."""
    flags = tuple(f"-march={instructions}" if flag == "-march=native" else flag for flag in choice._SOURCE.flags)
    kernel = PieceKernel(build_library(replace(choice._SOURCE, flags=flags), tmp_path, check_kernel))
    pieces = pieces_of(bytearray(3 * PIECE_BYTES))
    pair.read()
    statement = header(FrameKind.WRITTEN)
    digests, _ = kernel.write(packed(pieces), [2, 3], pair.outlet(), NONCE, statement, with_payload=False)
    frames = frames_in(pair.all())
    told = [(frame.kind, len(frame.names), frame.payload) for frame in frames]
    assert told == [(FrameKind.WRITTEN, 2, b""), (FrameKind.WRITTEN, 1, b"")]
    assert [digest for frame in frames for digest in frame.digests] == digests
    assert digests == [piece_digest(piece.source, NONCE, *piece.name) for piece in pieces]


def test_a_socket_that_takes_nothing_is_given_up(compiled: PieceKernel, pair: Pair) -> None:
    """And what was not sent in full does not count as written."""
    pieces = pieces_of(bytearray(30 * PIECE_BYTES))
    ends = list(range(1, 31))
    digests, outcome = compiled.write(packed(pieces), ends, pair.outlet(stall_ms=20), NONCE, header(), with_payload=True)
    assert outcome is Outcome.STALLED
    assert len(digests) < 30


def test_one_who_waits_is_woken(compiled: PieceKernel, pair: Pair) -> None:
    pieces = pieces_of(bytearray(30 * PIECE_BYTES))
    os.eventfd_write(pair.wake, 1)
    digests, outcome = compiled.write(packed(pieces), [30], pair.outlet(), NONCE, header(), with_payload=True)
    assert (digests, outcome) == ([], Outcome.WOKEN)


def test_a_peer_that_is_gone_is_noticed(compiled: PieceKernel, pair: Pair) -> None:
    pair.far.close()
    digests, outcome = compiled.write(
        packed(pieces_of(bytearray(PIECE_BYTES))), [1], pair.outlet(), NONCE, header(), with_payload=True
    )
    assert (digests, outcome) == ([], Outcome.BROKEN)


@pytest.mark.parametrize("patience_ms", [0, PATIENCE_MS])
def test_a_batch_goes_on_after_each_call(
    compiled: PieceKernel, pair: Pair, monkeypatch: pytest.MonkeyPatch, patience_ms: int
) -> None:
    """Calls end after some bytes, and where the socket has kept them waiting; the next one begins with the frame behind."""
    monkeypatch.setattr(writing, "CALL_BYTES", 3 * PIECE_BYTES)
    pieces = pieces_of(bytearray(11 * PIECE_BYTES))
    send = SocketSend(pair.near, pair.wake, lambda: None)
    send.outlet = pair.outlet(patience_ms=patience_ms)
    pair.read()
    digests = write_natively(compiled, send, FrameKind.BLOCKS, NONCE, *told(pieces), [2, 3, 7, 8, 11], never)
    assert digests == [piece_digest(piece.source, NONCE, *piece.name) for piece in pieces]
    frames = frames_in(pair.all())
    assert [len(frame.names) for frame in frames] == [2, 1, 4, 1, 3]
    assert b"".join(frame.payload for frame in frames) == b"".join(bytes(piece.source) for piece in pieces)


def test_a_stop_takes_effect_between_calls(compiled: PieceKernel, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "CALL_BYTES", 1)
    pieces = pieces_of(bytearray(6 * PIECE_BYTES))
    asked = iter([False, False, True])
    send = SocketSend(pair.near, pair.wake, lambda: None)
    pair.read()
    digests = write_natively(compiled, send, FrameKind.BLOCKS, NONCE, *told(pieces), [1, 4, 6], lambda: next(asked))
    assert len(digests) == 4
    assert [len(frame.names) for frame in frames_in(pair.all())] == [1, 3]


def test_a_link_that_was_dropped_is_not_written_to_any_more(
    compiled: PieceKernel, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CALL_BYTES", 1)
    reason = TransferBroken("the link was dropped")
    pieces = pieces_of(bytearray(2 * PIECE_BYTES))
    send = SocketSend(pair.near, pair.wake, lambda: reason)
    pair.read()
    with pytest.raises(TransferBroken, match="dropped"):
        write_natively(compiled, send, FrameKind.BLOCKS, NONCE, *told(pieces), [1, 2], never)
    assert len(frames_in(pair.all())) == 1
