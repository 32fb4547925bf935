"""The compiled copy against xxhash and against itself on narrower machines, behind a real link, and where it cannot be had."""

from __future__ import annotations

import asyncio
import ctypes
import random
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_digest

import kvtransfer.incoming as incoming_side
from common.clock import SystemClock
from common.config import pdserve_home
from common.errors import DigestMismatch
from common.native_build import COMPILERS, BuildError, build_library, find_compiler
from common.types import KVLayout, WorkerRef
from kvtransfer.digest import block_digest_of, piece_digest
from kvtransfer.native import choice, kernel, writing
from kvtransfer.native.kernel import Outcome, PieceKernel, check_kernel, packed_piece
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from kvtransfer.transports import fetching, offer, tcp

pytestmark = [
    pytest.mark.long,  # a compiler runs
    pytest.mark.skipif(find_compiler() is None, reason=f"none of {', '.join(COMPILERS)}"),
]
LAYOUT = KVLayout("m", "t", 3, 1, 8, 16, "float32", True)  # 1 KiB a layer


class Calls:
    """The library, and how many pieces it was asked for."""

    def __init__(self, kernel: PieceKernel) -> None:
        self.least_bytes = kernel.least_bytes
        self.follow = kernel.follow
        self.written = self.checked = 0
        self._kernel = kernel

    def write(self, pieces: bytes, *arguments: Any, **options: Any) -> tuple[list[bytes], Outcome]:
        digests, outcome = self._kernel.write(pieces, *arguments, **options)
        self.written += len(digests)
        return digests, outcome

    def digests(self, pieces: list[bytes], nonce: bytes) -> list[bytes]:
        self.checked += len(pieces)
        return self._kernel.digests(pieces, nonce)


@pytest.fixture(scope="module")
def library() -> Path:
    return build_library(choice._SOURCE, pdserve_home() / "kernels", check_kernel)


@pytest.fixture
def compiled(library: Path) -> PieceKernel:
    return PieceKernel(library)


def copied(own: PieceKernel, content: bytes, start: int, place: int) -> tuple[bytes, bytes]:
    """The digest, and all of the memory that was copied into, from its first multiple of 64 on."""
    source, memory = bytearray(start) + content, bytearray(len(content) + place + 256)
    from_address, to_address = (ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (source, memory))
    aligned = -to_address % 64
    (digest,) = own.copy([packed_piece(from_address + start, to_address + aligned + place, len(content), 0, 0, 0)])
    return digest, bytes(memory[aligned:])


def agrees_with_xxhash(own: PieceKernel) -> None:
    dice = random.Random(2)
    for size in (*range(241, 260), 1023, 1024, 1025, 2048, 2049, 12_288, *(dice.randrange(241, 20_000) for _ in range(60))):
        content, start, place = dice.randbytes(size), dice.randrange(65), dice.choice((0, 0, dice.randrange(65)))
        digest, memory = copied(own, content, start, place)
        assert digest == xxh3_128_digest(content), size
        assert memory[place : place + size] == content
        assert not any(memory[:place])
        assert not any(memory[place + size :])


def test_it_is_xxh3_of_what_was_copied(compiled: PieceKernel) -> None:
    agrees_with_xxhash(compiled)
    assert compiled.least_bytes == 241


@pytest.mark.parametrize("instructions", ["x86-64", "x86-64-v3"])
def test_narrower_machines_compute_the_same(tmp_path: Path, instructions: str) -> None:
    flags = tuple(f"-march={instructions}" if flag == "-march=native" else flag for flag in choice._SOURCE.flags)
    agrees_with_xxhash(PieceKernel(build_library(replace(choice._SOURCE, flags=flags), tmp_path, check_kernel)))


def test_a_library_that_computes_something_else_is_not_taken(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kernel(library)
    monkeypatch.setattr(kernel, "xxh3_128_digest", lambda content: bytes(16))
    with pytest.raises(BuildError, match="something else"):
        check_kernel(library)


def test_where_it_cannot_be_had_that_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(choice, "build_library", fail)
    monkeypatch.setattr(choice, "_was_asked", False)
    monkeypatch.setattr(choice, "_kernel", None)
    said: list[str] = []
    choice.prepare(tmp_path, said.append)
    choice.prepare(tmp_path, said.append)
    assert len(said) == 1
    assert "no C++ compiler" in said[0]
    assert choice.piece_kernel() is None


def test_who_asks_while_it_is_compiled_waits_for_it(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, may_end = threading.Event(), threading.Event()

    def compile_slowly(*_: object) -> Path:
        compiling.set()
        assert may_end.wait(60)
        return library

    monkeypatch.setattr(choice, "build_library", compile_slowly)
    monkeypatch.setattr(choice, "_was_asked", False)
    monkeypatch.setattr(choice, "_kernel", None)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(choice.prepare, tmp_path, pytest.fail)
        assert compiling.wait(60)
        second = threads.submit(lambda: (choice.prepare(tmp_path, pytest.fail), choice.piece_kernel())[1])
        wait({second}, timeout=0.2)
        is_through = second.done()
        may_end.set()
        assert not is_through
        first.result(60)
        assert second.result(60) is not None


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("spoiled", [False, True])
async def test_a_link_with_it_carries_and_notices_the_same(
    compiled: PieceKernel, monkeypatch: pytest.MonkeyPatch, kind: str, spoiled: bool
) -> None:
    """The digests are those of a link without it; what is spoiled after it was copied is noticed."""
    calls = Calls(compiled)
    for module in (offer, tcp, incoming_side, fetching):
        monkeypatch.setattr(module, "piece_kernel", lambda: calls)
    monkeypatch.setattr(offer, "STATED_BYTES", 5000)
    monkeypatch.setattr(tcp, "FRAME_BYTES", 5000)
    monkeypatch.setattr(writing, "CALL_BYTES", 9000)
    source, pool = (BlockRegion.create_shared(LAYOUT.block_bytes, 20) for _ in range(2))
    source.buffer[:] = random.Random(1).randbytes(source.buffer.nbytes)
    receiver = KVReceiver(pool, LAYOUT, "d", 1, b"s" * 32, SystemClock())
    sender = KVSender(source, LAYOUT, "p", 1, b"s" * 32, SystemClock())
    landed = receiver.pieces_written
    digested_on_the_way = 0

    def landing(link, nonce, written) -> None:  # type: ignore[no-untyped-def]
        nonlocal digested_on_the_way
        digested_on_the_way += sum(piece.found is not None for piece in written)
        if spoiled and (12, 0, 2) in [tuple(piece.name) for piece in written]:
            pool.block(7)[1500] ^= 1
        landed(link, nonce, written)

    monkeypatch.setattr(receiver, "pieces_written", landing)
    if spoiled:  # what is digested on the way can only be spoiled before it is announced: see test_native_following.py
        monkeypatch.setattr(receiver, "ticket_of", lambda link, nonce: None)
    async with asyncio.timeout(120):
        await sender.connect("d", 1, await receiver.start([kind], "127.0.0.1"), 20)
        blocks = tuple(range(19, -1, -1))
        incoming = receiver.open(
            request_id="r", attempt=0, prefill=WorkerRef("p", 1, ""), first_block=0, blocks=blocks, num_tokens=320, ttl_s=20.0
        )
        before = [bytes(source.block(block)) for block in range(20)]
        outgoing = sender.open(incoming.ticket)
        for layers, numbers in ((0, 2), range(20)), ((2, 3), range(19, -1, -1)):  # in another order they stay pieces of their own
            await outgoing.push([(block, block) for block in numbers], layers)
        if spoiled:
            assert isinstance(await incoming.wait_failed(), DigestMismatch)
        else:
            account = await outgoing.finish()
            await incoming.complete(Seal(incoming.ticket.nonce, 320, account.digests))
            assert calls.written == 40, "not by the library"
            assert (calls.checked, digested_on_the_way) == ((0, 40) if kind == "shm" else (40, 0))
            assert [bytes(pool.block(block)) for block in blocks] == before
            cut = memoryview(before[3])
            parts = [(0, 2, piece_digest(cut[:2048], incoming.ticket.nonce, 3, 0, 2))]
            parts.append((2, 1, piece_digest(cut[2048:], incoming.ticket.nonce, 3, 2, 1)))
            assert account.digests[3] == block_digest_of(parts)
        await sender.close()
        await receiver.close()
    pool.close()
    source.close()
