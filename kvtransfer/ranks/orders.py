"""Rank 0's orders to another rank of its worker, and what comes back: JSON over a pair of sockets that only these two have.

    rank 0   {"order": 7, "do": "push", "nonce": "00ff..", ...}   ------->   carried out by `beside`
             {"withdraw": 7}                                     ------->   whoever waited does not wait any more
             {"order": 7, "done": ...} | {"order": 7, "error": ...}  <----

Each message has its length before it. Orders begin in the order in which they were given, and end when they end. A rank that is
gone fails all orders, those to come as well. `RankOrders` is to rank 0 what a `RankEnd` is: it says nothing that that does not.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from common.errors import TransferBroken, error_from_code
from common.types import KVLayout, Ticket
from kvtransfer.outgoing import TransferAccount
from kvtransfer.ranks.rank_end import Introduction, ListenOrder, PeerRank, PushOrder
from kvtransfer.state import Seal
from kvtransfer.transports.base import TransportOffer
from kvtransfer.window import Run

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
CLOSE_S = 30.0  # a rank that takes longer to end its links is lost, and its worker with it
_LENGTH = struct.Struct("<I")

Fields = dict[str, Any]


class RankOrders:
    """A `SendingRank` and a `ReceivingRank`, carried out in another process. `end` is not closed: others may use it later."""

    def __init__(self, end: socket.socket, rank: int) -> None:
        self._end = end
        self._gone = f"rank {rank} of this worker is gone"
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._lost = False

    # -- as a sender ---------------------------------------------------------------------------------------------------

    async def send_as(self, own: Introduction) -> None:
        await self._ask("send_as", own=_introduction_to(own))

    async def connect(self, peer: PeerRank) -> str:
        kind: str = await self._ask("connect", peer=asdict(peer))
        return kind

    async def admit(self, ticket: Ticket) -> None:
        await self._ask("admit", ticket=ticket_to(ticket))

    async def push(self, nonce: bytes, order: PushOrder) -> None:
        logical = order.logical.start, order.logical.stop
        await self._ask("push", nonce=nonce.hex(), logical=logical, blocks=order.blocks, layers=(order.first, order.end))

    async def finish(self, nonce: bytes) -> TransferAccount:
        done = await self._ask("finish", nonce=nonce.hex())
        return TransferAccount(digests_from(done["digests"]), done["bytes"], done["transfer_s"])

    async def abort(self, nonce: bytes) -> None:
        await self._ask("abort", nonce=nonce.hex())

    async def release(self, nonces: Sequence[bytes]) -> None:
        await self._ask("release", nonces=[nonce.hex() for nonce in nonces])

    # -- as a receiver -------------------------------------------------------------------------------------------------

    async def receive_as(self, own: Introduction, listen: ListenOrder) -> list[TransportOffer]:
        offers = await self._ask("receive_as", own=_introduction_to(own), listen=asdict(listen))
        return [TransportOffer(**offer) for offer in offers]

    async def expect(self, ticket: Ticket) -> None:
        await self._ask("expect", ticket=ticket_to(ticket))

    async def wait_failed(self, nonce: bytes) -> None:
        await self._ask("wait_failed", nonce=nonce.hex())

    async def complete(self, nonce: bytes, seal: Seal) -> None:
        await self._ask("complete", nonce=nonce.hex(), num_tokens=seal.num_tokens, digests=digests_to(seal.digests))

    async def abandon(self, nonce: bytes) -> None:
        await self._ask("abandon", nonce=nonce.hex())

    async def received_bytes(self) -> Mapping[str, int]:
        received: dict[str, int] = await self._ask("received_bytes")
        return received

    # -- either --------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """A rank that is gone has closed everything."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._ask("close")
        except (TransferBroken, TimeoutError):
            return
        finally:
            self._lose()
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.wait({self._reading})
            if self._writer is not None:
                self._writer.close()

    # -- within --------------------------------------------------------------------------------------------------------

    async def _ask(self, do: str, **fields: object) -> Any:
        writer = await self._connected()
        if self._lost:
            raise TransferBroken(self._gone)
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            writer.write(framed({"order": number, "do": do, **fields}))
            return await answer  # ends with the rank, if not before
        finally:
            del self._waiting[number]
            if answer.cancelled() and not self._lost:
                writer.write(framed({"withdraw": number}))

    async def _connected(self) -> asyncio.StreamWriter:
        async with self._connecting:
            if self._writer is None:
                reader, self._writer = await asyncio.open_unix_connection(sock=self._end.dup())
                self._reading = asyncio.get_running_loop().create_task(self._read(reader), name="kv-rank-answers")
            return self._writer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (message := await next_message(reader)) is not None:
            answer = self._waiting.get(message["order"])
            if answer is None or answer.done():
                continue
            error = message.get("error")
            if error is None:
                answer.set_result(message["done"])
            else:
                answer.set_exception(error_from_code(error["code"], error["message"], param=error["param"]))
        self._lose()

    def _lose(self) -> None:
        self._lost = True
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(TransferBroken(self._gone))


def framed(message: Mapping[str, object]) -> bytes:
    data = json.dumps(message).encode()
    return _LENGTH.pack(len(data)) + data


async def next_message(reader: asyncio.StreamReader) -> Fields | None:
    """None at the end, also one in the middle of a message."""
    try:
        (size_bytes,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if size_bytes > MAX_MESSAGE_BYTES:
            return None
        message: Fields = json.loads(await reader.readexactly(size_bytes))
        return message
    except (asyncio.IncompleteReadError, OSError):
        return None


# -- values as JSON, and back ---------------------------------------------------------------------------------------------


def ticket_to(ticket: Ticket) -> Fields:
    return {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in ((name, getattr(ticket, name)) for name in Ticket.__slots__)
    }


def ticket_from(fields: Fields) -> Ticket:
    as_bytes = {name: bytes.fromhex(fields[name]) for name in ("nonce", "layout_fingerprint", "mac")}
    return Ticket(**{**fields, **as_bytes, "blocks": tuple(fields["blocks"]), "part": tuple(fields["part"])})


def digests_to(digests: Mapping[int, bytes]) -> dict[str, str]:
    return {str(logical): digest.hex() for logical, digest in digests.items()}


def digests_from(fields: Mapping[str, str]) -> dict[int, bytes]:
    return {int(logical): bytes.fromhex(digest) for logical, digest in fields.items()}


def _introduction_to(own: Introduction) -> Fields:
    return {**asdict(own), "secret": own.secret.hex()}


def introduction_from(fields: Fields) -> Introduction:
    return Introduction(**{**fields, "secret": bytes.fromhex(fields["secret"]), "layout": KVLayout(**fields["layout"])})


def listen_order_from(fields: Fields) -> ListenOrder:
    return ListenOrder(**{**fields, "kinds": tuple(fields["kinds"])})


def peer_from(fields: Fields) -> PeerRank:
    offers = tuple(TransportOffer(**offer) for offer in fields["offers"])
    runs = tuple(Run(*run) for run in fields["runs"])
    return PeerRank(**{**fields, "offers": offers, "layout": KVLayout(**fields["layout"]), "runs": runs})


def push_order_from(fields: Fields) -> PushOrder:
    return PushOrder(range(*fields["logical"]), tuple(fields["blocks"]), *fields["layers"])
