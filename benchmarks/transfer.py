"""What KV transfer costs beside what the machine can do: shm against one memcpy, tcp against a bare socket, in the same run.

    python -m benchmarks.transfer [--block-kib 360] [--blocks 46] [--layers 30] [--rounds 15] [--only NAME] [--json out.json]

The prefill side is a process of its own, as in service. Both read the same monotonic clock. Of each transfer two times are taken:

    push to verified     from the first push, the writer having been let in before (as in service, where it asks when Run starts),
                         until the last piece's digest was found right on the decode side
    ticket to usable     from handing out the ticket until `complete` has returned: with control, permission, CLOSE and seal

Compared things alternate in rounds of A B B A; a ratio is taken in each round. Reported are the median of the ratios, and
between which two of them the true median lies with 95 % (by their ranks: nothing is assumed of how they spread). A target is
reached or missed where this interval lies on one side of it; else more rounds are needed. `memcpy` is one call of one thread
over all bytes, between two regions whose pages were touched, of the same kind of memory and after the same pause as a
transfer; unlike one, it wakes nobody. `bare socket` is one `sendall` over all bytes and as many `recv_into` as it takes,
between the same two processes, both blocking. Digests are always on; what they cost is the ratio to a transfer in which both
processes replace the digest of a piece by a constant and copy by memmove, which only this benchmark can. `last byte to
verified` is the time for which the writer had nothing left to do: from when it had sent or stated everything until the last
piece was found right, with waking whoever reads and what that one is behind. `by layer` pushes one layer of all blocks after
the other without a pause, so that most of them wait for the first, and go together. `in a row` pushes the KV of eight
prompts, a transfer each, one behind the other, as a worker with work to do does: from the first push until the last piece of
the last one was found right, against eight times the bytes of a copy or a socket; what one transfer waits for at its
beginning and its end, others use. `both ends on one core` counts transfers whose last batch was written and verified by the
same core: a kernel often puts whoever is woken on the core of the one that wakes it, above all in a virtual machine whose
other core sleeps, and then nothing is done side by side. What a ratio says depends on it. With `--cores-apart` each of the
two processes keeps to a core of its own, in all that is compared, as where operators bind workers to cores. The native
library is compiled before anything is measured; `--python-copies` does without it.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import math
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import kvtransfer.incoming
import kvtransfer.transports.fetching
import kvtransfer.transports.offer
import kvtransfer.transports.tcp
from common.clock import SystemClock
from common.config import pdserve_home
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.digest import piece_digest
from kvtransfer.native.choice import piece_kernel, prepare
from kvtransfer.native.kernel import packed_piece
from kvtransfer.receiver import Incoming, KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import ReceiverLink, TransportOffer, Written
from kvtransfer.transports.offer import Offer
from kvtransfer.transports.tcp import WireWriter

WARM_UPS = 3
IN_A_ROW = 8  # transfers
TARGETS = {
    "shm / memcpy": 1.25,
    "tcp / bare socket": 1.18,
    "shm in a row / memcpy": 1.25,
    "tcp in a row / bare socket": 1.18,
}
PATIENCE_S = 60.0
SECRET = derive_secret("benchmark")
DIGESTING = (kvtransfer.incoming, kvtransfer.transports.fetching, kvtransfer.transports.offer, kvtransfer.transports.tcp)


@dataclass(frozen=True)
class Shape:
    block_bytes: int
    num_blocks: int
    num_layers: int

    @property
    def layout(self) -> KVLayout:
        return KVLayout("m", "t", self.num_layers, 1, self.block_bytes // self.num_layers // (2 * 16 * 2), 16, "bfloat16", True)

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    def region(self) -> BlockRegion:
        """Of as many transfers as there are in a row."""
        return BlockRegion.create_shared(self.block_bytes, IN_A_ROW * self.num_blocks)


def constant_digest(piece: memoryview, nonce: bytes, logical_block: int, first_layer: int, num_layers: int) -> bytes:
    return bytes(16)


def use_digests(on: bool) -> None:
    for module in DIGESTING:
        module.piece_digest = piece_digest if on else constant_digest  # type: ignore[attr-defined]
        module.piece_kernel = piece_kernel if on else lambda: None  # type: ignore[attr-defined]


# -- the prefill side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Push:
    tickets: Sequence[Ticket]  # pushed one behind the other
    by_layer: bool
    digests: bool


@dataclass(frozen=True)
class Pushed:
    started_s: float
    digests: Sequence[dict[int, bytes]] = ()  # of each ticket
    written_s: float = 0.0  # the last byte
    core: int = -1  # that wrote it


def keep_to(core: int | None) -> None:
    """All threads of this process that are started from now on; None = wherever the kernel puts them."""
    if core is not None:
        os.sched_setaffinity(0, {core})


@dataclass(frozen=True)
class BeBareSocket:
    port: int


@dataclass(frozen=True)
class SendBytes:
    num_bytes: int
    start_s: float


def prefill_process(control: Connection, shape: Shape, native: bool, core: int | None) -> None:
    keep_to(core)
    if native:
        prepare(pdserve_home() / "kernels", print)
    note_writes()
    asyncio.run(_prefill(control, shape))


async def _prefill(control: Connection, shape: Shape) -> None:
    region = shape.region()
    region.buffer[:] = os.urandom(region.buffer.nbytes)
    sender = KVSender(region, shape.layout, "p", 1, SECRET, SystemClock())
    bare: socket.socket | None = None
    while (order := await asyncio.to_thread(control.recv)) is not None:
        match order:
            case Push():
                use_digests(order.digests)
                control.send(await _push(sender, order, shape))
            case TransportOffer():
                control.send(await sender.connect("d/" + order.kind, 1, [order], region.num_blocks))
            case BeBareSocket():
                bare = socket.create_connection(("127.0.0.1", order.port))
            case SendBytes(num_bytes, start_s) if bare is not None:
                await asyncio.sleep(start_s - time.perf_counter())
                started_s = time.perf_counter()
                bare.sendall(region.buffer[:num_bytes])
                control.send(Pushed(started_s))
    await sender.close()
    if bare is not None:
        bare.close()


async def _push(sender: KVSender, order: Push, shape: Shape) -> Pushed:
    outgoings = [sender.open(ticket) for ticket in order.tickets]
    async with asyncio.timeout(PATIENCE_S):
        while not all(outgoing._credit_bytes for outgoing in outgoings):  # noqa: ASYNC110 - not let in yet, and no event says so
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.003)
    started_s = time.perf_counter()
    for number, outgoing in enumerate(outgoings):
        everything = [(block, number * shape.num_blocks + block) for block in range(shape.num_blocks)]
        if order.by_layer:
            for layer in range(shape.num_layers):
                await outgoing.push(everything, (layer, layer + 1))
        else:
            await outgoing.push(everything)
    accounts = [await outgoing.finish() for outgoing in outgoings]
    return Pushed(started_s, [dict(account.digests) for account in accounts], _written_s, _written_by)


_core = ctypes.CDLL(None).sched_getcpu  # that the calling thread is on
_written_s = 0.0
_written_by = -1


def note_writes() -> None:
    """From now on `_written_s` is when a batch was written, and `_written_by` on which core."""
    prepare, write = WireWriter.prepare, Offer.write

    def noted(job: Callable[[], list[bytes]]) -> list[bytes]:
        global _written_s, _written_by
        digests = job()
        _written_s, _written_by = time.perf_counter(), _core()
        return digests

    WireWriter.prepare = lambda *arguments: partial(noted, prepare(*arguments))  # type: ignore[method-assign]
    Offer.write = lambda *arguments: noted(partial(write, *arguments))  # type: ignore[method-assign]


# -- the decode side ---------------------------------------------------------------------------------------------------


class TimedReceiver(KVReceiver):
    verified_s = 0.0
    verified_by = -1

    def pieces_written(self, link: ReceiverLink, nonce: bytes, written: Sequence[Written]) -> None:
        super().pieces_written(link, nonce, written)
        self.verified_s, self.verified_by = time.perf_counter(), _core()


class Decode:
    def __init__(self, kind: str, control: Connection, shape: Shape) -> None:
        self.kind = kind
        self._control = control
        self._shape = shape
        self._region = shape.region()
        self._receiver = TimedReceiver(self._region, shape.layout, "d/" + kind, 1, SECRET, SystemClock())
        self._attempt = 0
        self.exposed_s = 0.0  # of the last transfer, from its last byte until it was verified
        self.transfers = 0  # or rows of them
        self.on_one_core = 0  # of these, by how the last one ended

    async def start(self) -> None:
        self._control.send((await self._receiver.start([self.kind], "127.0.0.1"))[0])
        await asyncio.to_thread(self._control.recv)

    async def transfer(self, *, by_layer: bool = False, digests: bool = True, in_a_row: int = 1) -> tuple[float, float]:
        """Seconds from the first push to verified, and from the first ticket to usable."""
        use_digests(digests)
        began_s = time.perf_counter()
        incomings = [self._open(number) for number in range(in_a_row)]
        self._control.send(Push([incoming.ticket for incoming in incomings], by_layer, digests))
        pushed: Pushed = await asyncio.to_thread(self._control.recv)
        for incoming, its_digests in zip(incomings, pushed.digests, strict=True):
            await incoming.complete(Seal(incoming.ticket.nonce, incoming.ticket.num_tokens, its_digests))
        use_digests(True)
        self.exposed_s = self._receiver.verified_s - pushed.written_s
        self.on_one_core += self._receiver.verified_by == pushed.core
        self.transfers += 1
        return self._receiver.verified_s - pushed.started_s, time.perf_counter() - began_s

    def _open(self, number: int) -> Incoming:
        """The transfer of this number in a row, into blocks of its own."""
        self._attempt += 1
        return self._receiver.open(
            request_id="r",
            attempt=self._attempt,
            prefill=WorkerRef("p", 1, ""),
            first_block=0,
            blocks=range(number * self._shape.num_blocks, (number + 1) * self._shape.num_blocks),
            num_tokens=16 * self._shape.num_blocks,
            ttl_s=PATIENCE_S,
        )

    async def close(self) -> None:
        await self._receiver.close()
        self._region.close()


class Memory:
    """What one thread does between two regions; `in_a_row` as of a transfer."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._source, self._destination = shape.region(), shape.region()
        self._source.buffer[:] = os.urandom(self._source.buffer.nbytes)

    async def copy(self, in_a_row: int = 1) -> float:
        num_bytes = in_a_row * self._shape.total_bytes
        source, destination = (np.frombuffer(region.buffer, np.uint8)[:num_bytes] for region in (self._source, self._destination))
        await asyncio.sleep(0.003)  # the other side of a comparison comes from a pause, too
        started_s = time.perf_counter()
        np.copyto(destination, source)
        return time.perf_counter() - started_s

    async def copy_and_digest(self) -> float:
        """Block by block with the native library, as the reader over shared memory does it."""
        kernel = piece_kernel()
        assert kernel is not None
        source, destination, size = self._source.address, self._destination.address, self._shape.block_bytes
        moves = [
            packed_piece(source + start, destination + start, size, 0, 0, 0) for start in range(0, self._shape.total_bytes, size)
        ]
        await asyncio.sleep(0.003)
        started_s = time.perf_counter()
        kernel.copy(moves)
        return time.perf_counter() - started_s


class BareSocket:
    def __init__(self, control: Connection, shape: Shape) -> None:
        self._control = control
        self._shape = shape
        self._region = shape.region()
        with socket.create_server(("127.0.0.1", 0)) as server:
            control.send(BeBareSocket(server.getsockname()[1]))
            self._sock, _ = server.accept()

    async def receive(self, in_a_row: int = 1) -> float:
        left = self._region.buffer[: in_a_row * self._shape.total_bytes]
        self._control.send(SendBytes(left.nbytes, time.perf_counter() + 0.005))
        while left:
            left = left[self._sock.recv_into(left) :]
        received_s = time.perf_counter()
        pushed: Pushed = await asyncio.to_thread(self._control.recv)
        return received_s - pushed.started_s

    def close(self) -> None:
        self._sock.close()


# -- comparing ---------------------------------------------------------------------------------------------------------


Measure = Callable[[], Awaitable[float]]


async def compare(ours: Measure, other: Measure, rounds: int) -> dict[str, float]:
    """Medians of both in seconds, and of the rounds' ratios ours / other, with the interval that it lies in; and the ratio of the
    two least times, which says more than medians do where others use the machine."""
    for _ in range(WARM_UPS):
        await ours()
        await other()
    rank_below = max(0, math.floor((rounds - 1.96 * math.sqrt(rounds)) / 2))  # of the interval's ends
    all_ours, all_others, ratios = [], [], []
    for _ in range(rounds):
        first, second, third, fourth = await ours(), await other(), await other(), await ours()
        all_ours += [first, fourth]
        all_others += [second, third]
        ratios.append((first + fourth) / (second + third))
    return {
        "ours_s": statistics.median(all_ours),
        "other_s": statistics.median(all_others),
        "ratio": statistics.median(ratios),
        "ratio_low": sorted(ratios)[rank_below],
        "ratio_high": sorted(ratios)[-1 - rank_below],
        "least_ratio": min(all_ours) / min(all_others),
    }


def verified(decode: Decode, *, by_layer: bool = False, digests: bool = True, in_a_row: int = 1) -> Measure:
    async def measure() -> float:
        return (await decode.transfer(by_layer=by_layer, digests=digests, in_a_row=in_a_row))[0]

    return measure


async def measure_all(control: Connection, shape: Shape, rounds: int, only: str) -> dict[str, dict[str, float]]:
    """`only`: a part of the names of what is measured."""
    shm, tcp = Decode("shm", control, shape), Decode("tcp", control, shape)
    await shm.start()
    await tcp.start()
    memory, bare = Memory(shape), BareSocket(control, shape)
    row = partial(memory.copy, IN_A_ROW), partial(bare.receive, IN_A_ROW)
    comparisons: dict[str, tuple[Measure, Measure]] = {
        "shm / memcpy": (verified(shm), memory.copy),
        "tcp / bare socket": (verified(tcp), bare.receive),
        "shm in a row / memcpy": (verified(shm, in_a_row=IN_A_ROW), row[0]),
        "tcp in a row / bare socket": (verified(tcp, in_a_row=IN_A_ROW), row[1]),
        "shm by layer / memcpy": (verified(shm, by_layer=True), memory.copy),
        "tcp by layer / bare socket": (verified(tcp, by_layer=True), bare.receive),
        "shm / shm without digests": (verified(shm), verified(shm, digests=False)),
        "tcp / tcp without digests": (verified(tcp), verified(tcp, digests=False)),
    }
    if piece_kernel() is not None:
        comparisons["native copy, digest / memcpy"] = memory.copy_and_digest, memory.copy
    results = {name: await compare(*pair, rounds) for name, pair in comparisons.items() if only in name}
    for decode in (shm, tcp):
        if only in f"{decode.kind} last byte to verified":
            exposed, shares = [], []
            for _ in range(2 * rounds):
                transfer_s, _ = await decode.transfer()
                exposed.append(decode.exposed_s)
                shares.append(decode.exposed_s / transfer_s)
            results[f"{decode.kind} last byte to verified"] = {
                "ours_s": statistics.median(exposed),
                "share": statistics.median(shares),
            }
        if only in f"{decode.kind} ticket to usable":
            whole = [(await decode.transfer())[1] for _ in range(2 * rounds)]
            results[f"{decode.kind} ticket to usable"] = {"ours_s": statistics.median(whole)}
        if decode.transfers:
            results[f"{decode.kind}, both ends on one core"] = {"count": decode.on_one_core, "of": decode.transfers}
    bare.close()
    await shm.close()
    await tcp.close()
    return results


def verdict(name: str, row: dict[str, float]) -> str:
    target = TARGETS.get(name)
    if target is None:
        return ""
    decided = "reached" if row["ratio_high"] <= target else "missed" if row["ratio_low"] > target else "undecided"
    return f"   target {target:.2f}: {decided}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-kib", type=int, default=360)
    parser.add_argument("--blocks", type=int, default=46)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--python-copies", action="store_true", help="as where there is no compiler")
    parser.add_argument("--cores-apart", action="store_true", help="each of the two processes keeps to a core of its own")
    parser.add_argument("--only", default="", help="measures those whose names contain this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = Shape(options.block_kib * 1024, options.blocks, options.layers)

    context = multiprocessing.get_context("spawn")
    control, theirs = context.Pipe()
    cores = sorted(os.sched_getaffinity(0))
    if options.cores_apart and len(cores) < 2:
        parser.error("--cores-apart: there is only one core")
    prefill_core, decode_core = (cores[0], cores[-1]) if options.cores_apart else (None, None)
    process = context.Process(target=prefill_process, args=(theirs, shape, not options.python_copies, prefill_core))
    process.start()
    keep_to(decode_core)
    if not options.python_copies:
        prepare(pdserve_home() / "kernels", print)
    load_before = os.getloadavg()[0]
    results = asyncio.run(measure_all(control, shape, options.rounds, options.only))
    control.send(None)
    process.join()

    where = "wherever the kernel puts both ends" if prefill_core is None else "a core for each end"
    print(
        f"{shape.total_bytes / 2**20:.1f} MiB, {shape.num_blocks} blocks of {shape.num_layers} layers, {options.rounds} rounds; "
        f"{os.cpu_count()} CPUs, {where}, load {load_before:.1f} before, {os.getloadavg()[0]:.1f} after"
    )
    for name, row in results.items():
        if "count" in row:
            print(f"  {name:29} {row['count']:4.0f} of {row['of']:.0f} transfers")
            continue
        num_bytes = shape.total_bytes * (IN_A_ROW if "in a row" in name else 1)
        gigabytes_per_s = num_bytes / row["ours_s"] / 1e9
        line = f"  {name:29} {row['ours_s'] * 1e3:7.2f} ms {gigabytes_per_s:6.2f} GB/s"
        if "share" in row:
            line = f"  {name:29} {row['ours_s'] * 1e3:7.3f} ms {row['share']:6.1%} of the transfer"
        if "ratio" in row:
            line += (
                f"   {row['ratio']:5.2f} x of {row['other_s'] * 1e3:.2f} ms"
                f" (95 %: {row['ratio_low']:.2f} to {row['ratio_high']:.2f})   least {row['least_ratio']:.2f} x"
            )
            line += verdict(name, row)
        print(line)
    summary = {
        "total_bytes": shape.total_bytes,
        "block_bytes": shape.block_bytes,
        "num_layers": shape.num_layers,
        "rounds": options.rounds,
        "cpus": os.cpu_count(),
        "cores_apart": options.cores_apart,
        "machine": platform.machine(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "results": results,
    }
    print(json.dumps(summary))
    if options.json is not None:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
