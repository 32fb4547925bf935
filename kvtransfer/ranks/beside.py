"""What a rank other than 0 runs beside its share of the model: carries out rank 0's orders (`orders`) until rank 0 is gone.

    Beside.serve(socket, ...) ── order ── a task of its own ── {"done"} | {"error"}

In a thread of the rank's process, with an event loop of its own; what computes does not wait for it. An order that fails with an
error of ours says so, and only that order has failed; anything else ends `serve`, and with it the process.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from dataclasses import asdict
from functools import partial

from common.clock import SystemClock
from common.config import pdserve_home
from common.errors import IllegalTransition, PdserveError
from common.logs import get_logger
from kvtransfer.device import DeviceMemory, region_of_pool
from kvtransfer.native.choice import prepare
from kvtransfer.ranks.orders import (
    Fields,
    digests_from,
    digests_to,
    framed,
    introduction_from,
    listen_order_from,
    next_message,
    peer_from,
    push_order_from,
    ticket_from,
)
from kvtransfer.ranks.rank_end import RankEnd
from kvtransfer.region import BlockRegion, PoolMemory
from kvtransfer.state import Seal

_log = get_logger(__name__)


class Beside:
    """What a rank's process is given of the transfer: memory for the rank's pool, and what serves hand-offs of it."""

    def __init__(self, *, touch: bool) -> None:
        """`touch` as of `PoolMemory`."""
        self.memory = PoolMemory(touch=touch)

    def serve(self, end: socket.socket, device_memory: DeviceMemory | None, block_bytes: int) -> None:
        """Once the pool is there: in `memory`, or on a device. Blocking, as `serve`."""
        serve(end, region_of_pool(self.memory, device_memory, block_bytes))


def serve(end: socket.socket, region: BlockRegion) -> None:
    """Until the other end of `end` is closed, which it owns, and the region, which is the rank's pool. Blocking; raises what is a
    bug."""
    try:
        asyncio.run(_carry_out(RankEnd(region, SystemClock()), end))
    finally:
        region.close()


async def _carry_out(rank: RankEnd, end: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=end)
    tasks: dict[int, asyncio.Task[None]] = {}
    try:
        async with asyncio.TaskGroup() as group:
            while (message := await next_message(reader)) is not None:
                withdrawn = message.get("withdraw")
                if withdrawn is None:
                    number = message["order"]
                    tasks[number] = group.create_task(_answer(rank, message, writer), name=f"kv-order-{message['do']}")
                    tasks[number].add_done_callback(partial(_forget, tasks, number))
                elif withdrawn in tasks:
                    tasks[withdrawn].cancel()
            for task in tuple(tasks.values()):  # rank 0 is gone: nobody wants to know
                task.cancel()
    finally:
        await rank.close()
        writer.close()


def _forget(tasks: dict[int, asyncio.Task[None]], number: int, _: asyncio.Task[None]) -> None:
    del tasks[number]


async def _answer(rank: RankEnd, message: Fields, writer: asyncio.StreamWriter) -> None:
    answer: Fields = {"order": message["order"]}
    try:
        answer["done"] = await _do(rank, message)
    except PdserveError as error:
        answer["error"] = {"code": error.code, "message": error.message, "param": error.param}
    writer.write(framed(answer))


async def _do(rank: RankEnd, message: Fields) -> object:
    nonce = bytes.fromhex(message.get("nonce", ""))
    match message["do"]:
        case "send_as":
            # Transfers do not wait for it.
            threading.Thread(
                target=prepare, args=(pdserve_home() / "kernels", _log.warning), name="kv-native", daemon=True
            ).start()
            await rank.send_as(introduction_from(message["own"]))
        case "connect":
            return await rank.connect(peer_from(message["peer"]))
        case "admit":
            await rank.admit(ticket_from(message["ticket"]))
        case "push":
            await rank.push(nonce, push_order_from(message))
        case "finish":
            account = await rank.finish(nonce)
            return {"digests": digests_to(account.digests), "bytes": account.bytes, "transfer_s": account.transfer_s}
        case "abort":
            await rank.abort(nonce)
        case "release":
            await rank.release([bytes.fromhex(one) for one in message["nonces"]])
        case "receive_as":
            offers = await rank.receive_as(introduction_from(message["own"]), listen_order_from(message["listen"]))
            return [asdict(offer) for offer in offers]
        case "expect":
            await rank.expect(ticket_from(message["ticket"]))
        case "wait_failed":
            await rank.wait_failed(nonce)
        case "complete":
            await rank.complete(nonce, Seal(nonce, message["num_tokens"], digests_from(message["digests"])))
        case "abandon":
            await rank.abandon(nonce)
        case "received_bytes":
            return await rank.received_bytes()
        case "close":
            await rank.close()
        case unknown:
            raise IllegalTransition(f"the unknown order {unknown!r}")
    return None
