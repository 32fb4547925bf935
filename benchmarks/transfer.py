"""What KV transfer costs beside what the machine can do: shm against memcpy, tcp against a bare socket, in the same run.

    python -m benchmarks.transfer [--block-kib 360] [--blocks 46] [--repeat 30] [--json out.json]

The prefill side is a process of its own, as in service. A transfer is timed on the decode side from handing out the ticket until
every block is verified, so it holds a round trip of control, the permission to write, both digests and the CLOSE. Medians; the
first runs, which touch the pages, do not count. `digest_share` is the time for digesting the blocks once, alone, over the time of
the transfer: an upper bound on what integrity adds, since the two sides digest while the other one copies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from common.clock import SystemClock
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.digest import block_digest
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import TransportOffer

WARM_UPS = 3
SECRET = derive_secret("benchmark")


def layout_of(block_bytes: int) -> KVLayout:
    return KVLayout("m", "t", 1, 1, block_bytes // (2 * 16 * 2), 16, "bfloat16", True)


def median_s(action: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(WARM_UPS + repeat):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UPS:])


# -- the prefill side --------------------------------------------------------------------------------------------------


def prefill_process(control: Connection, block_bytes: int, num_blocks: int) -> None:
    asyncio.run(_prefill(control, block_bytes, num_blocks))


async def _prefill(control: Connection, block_bytes: int, num_blocks: int) -> None:
    region = BlockRegion.create_shared(block_bytes, num_blocks)
    region.buffer[:] = os.urandom(region.buffer.nbytes)
    sender = KVSender(region, layout_of(block_bytes), "p", 1, SECRET, SystemClock())
    while (order := await asyncio.to_thread(control.recv)) is not None:
        if isinstance(order, Ticket):
            outgoing = sender.open(order)
            await outgoing.push([(block, block) for block in range(num_blocks)])
            control.send((await outgoing.finish()).digests)
        elif isinstance(order, TransportOffer):
            control.send(await sender.connect("d/" + order.kind, 1, [order], num_blocks))
        else:  # a port: be a bare socket
            with socket.create_connection(("127.0.0.1", order)) as sock:
                while sock.recv(1):
                    for block in range(num_blocks):
                        sock.sendall(region.block(block))
    await sender.close()


# -- the decode side ---------------------------------------------------------------------------------------------------


async def time_transport(kind: str, control: Connection, block_bytes: int, num_blocks: int, repeat: int) -> float:
    region = BlockRegion.create_shared(block_bytes, num_blocks)
    receiver = KVReceiver(region, layout_of(block_bytes), "d/" + kind, 1, SECRET, SystemClock())
    control.send((await receiver.start([kind], "127.0.0.1"))[0])
    await asyncio.to_thread(control.recv)
    times = []
    for attempt in range(WARM_UPS + repeat):
        started = time.perf_counter()
        incoming = receiver.open(
            request_id="r",
            attempt=attempt,
            prefill=WorkerRef("p", 1, ""),
            first_block=0,
            blocks=range(num_blocks),
            num_tokens=16 * num_blocks,
            ttl_s=60.0,
        )
        control.send(incoming.ticket)
        digests = await asyncio.to_thread(control.recv)
        await incoming.complete(Seal(incoming.ticket.nonce, 16 * num_blocks, digests))
        times.append(time.perf_counter() - started)
    await receiver.close()
    region.close()
    return statistics.median(times[WARM_UPS:])


def time_bare_socket(control: Connection, block_bytes: int, num_blocks: int, repeat: int) -> float:
    region = BlockRegion.create_shared(block_bytes, num_blocks)
    with socket.create_server(("127.0.0.1", 0)) as server:
        control.send(server.getsockname()[1])
        sock, _ = server.accept()

    def receive_all() -> None:
        sock.sendall(b"g")
        for block in range(num_blocks):
            view = region.block(block)
            while view:
                view = view[sock.recv_into(view) :]

    with sock:
        return median_s(receive_all, repeat)


def time_memory(block_bytes: int, num_blocks: int, repeat: int) -> tuple[float, float]:
    source = BlockRegion.create_shared(block_bytes, num_blocks)
    destination = BlockRegion.create_shared(block_bytes, num_blocks)
    source.buffer[:] = os.urandom(source.buffer.nbytes)

    def copy_all() -> None:
        for block in range(num_blocks):
            np.copyto(np.frombuffer(destination.block(block), np.uint8), np.frombuffer(source.block(block), np.uint8))

    def digest_all() -> None:
        for block in range(num_blocks):
            block_digest(destination.block(block), bytes(16), block)

    return median_s(copy_all, repeat), median_s(digest_all, repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-kib", type=int, default=360)
    parser.add_argument("--blocks", type=int, default=46)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    block_bytes, num_blocks, repeat = options.block_kib * 1024, options.blocks, options.repeat

    context = multiprocessing.get_context("spawn")
    control, theirs = context.Pipe()
    process = context.Process(target=prefill_process, args=(theirs, block_bytes, num_blocks))
    process.start()
    copy_s, digest_s = time_memory(block_bytes, num_blocks, repeat)
    shm_s = asyncio.run(time_transport("shm", control, block_bytes, num_blocks, repeat))
    tcp_s = asyncio.run(time_transport("tcp", control, block_bytes, num_blocks, repeat))
    bare_s = time_bare_socket(control, block_bytes, num_blocks, repeat)
    control.send(None)
    process.join()

    total_bytes = block_bytes * num_blocks
    rows = {"memcpy": copy_s, "digest": digest_s, "bare socket": bare_s, "shm": shm_s, "tcp": tcp_s}
    result = {
        "bytes": total_bytes,
        "block_bytes": block_bytes,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "seconds": rows,
        "gigabytes_per_s": {name: total_bytes / seconds / 1e9 for name, seconds in rows.items()},
        "shm_over_memcpy": shm_s / copy_s,
        "tcp_over_bare_socket": tcp_s / bare_s,
        "digest_share": {"shm": digest_s / shm_s, "tcp": digest_s / tcp_s},
    }
    print(f"{total_bytes / 2**20:.1f} MiB in blocks of {options.block_kib} KiB, median of {repeat}")
    for name, seconds in rows.items():
        print(f"  {name:12} {seconds * 1e3:8.2f} ms {total_bytes / seconds / 1e9:8.2f} GB/s")
    print(f"  shm takes {shm_s / copy_s:.1f} x memcpy, tcp {tcp_s / bare_s:.2f} x a bare socket")
    print(f"  digest alone: {digest_s / shm_s:.1%} of shm, {digest_s / tcp_s:.1%} of tcp")
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
