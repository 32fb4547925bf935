"""A prefill worker's transfer end in a process of its own, to be stopped and killed. Obeys JSON lines on stdin, answers each.

{"do": "connect", "kind", "address", "pool_blocks"} · {"do": "open", "ticket"} · {"do": "push", "blocks"} · {"do": "finish"}
{"do": "half", "logical"}: tcp: a header and half of its block, then nothing; shm: where it lies, and not what it is
{"do": "release", "nonce"}
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from common.clock import SystemClock
from common.errors import PdserveError
from common.types import KVLayout, Ticket
from kvtransfer.digest import piece_digest
from kvtransfer.frames import Frame, FrameKind, encode_places, encode_table
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender, Outgoing
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import PieceName, TransportOffer

LAYOUT = KVLayout("model", "tokenizer", 16, 4, 32, 16, "float32", True)  # 256 KiB a block
SOURCE_BLOCKS = 64


def source_block(index: int) -> bytes:
    return bytes([index + 1]) * LAYOUT.block_bytes


class Peer:
    def __init__(self, worker_id: str) -> None:
        self.region = BlockRegion.create_shared(LAYOUT.block_bytes, SOURCE_BLOCKS)
        for index in range(SOURCE_BLOCKS):
            self.region.block(index)[:] = source_block(index)
        self.sender = KVSender(self.region, LAYOUT, worker_id, 1, derive_secret("token"), SystemClock())
        self.outgoing: Outgoing | None = None

    async def obey(self, order: dict[str, Any]) -> Any:
        match order["do"]:
            case "connect":
                offer = TransportOffer(order["kind"], order["address"])
                return await self.sender.connect("m/decode/0", 1, [offer], order["pool_blocks"])
            case "open":
                values = order["ticket"]
                for name in ("nonce", "layout_fingerprint", "mac"):
                    values[name] = bytes.fromhex(values[name])
                self.outgoing = self.sender.open(
                    Ticket(**{**values, "blocks": tuple(values["blocks"]), "part": tuple(values["part"])})
                )
            case "release":
                await self.sender.release([bytes.fromhex(order["nonce"])])
            case "push" if self.outgoing is not None:
                await self.outgoing.push([(logical, source) for logical, source in order["blocks"]])
            case "finish" if self.outgoing is not None:
                account = await self.outgoing.finish()
                return {logical: digest.hex() for logical, digest in account.digests.items()}
            case "half" if self.outgoing is not None:
                link, nonce, logical = self.outgoing._link, self.outgoing.ticket.nonce, order["logical"]
                block = self.region.block(logical)
                name = PieceName(logical, 0, LAYOUT.num_layers)
                if link.kind == "shm":  # type: ignore[union-attr]
                    table = encode_places([logical], 0, LAYOUT.num_layers, [logical * LAYOUT.block_bytes])
                    ready = Frame(FrameKind.READY, nonce, 1).encode() + table
                    await link._in_lane(lambda: link._send([ready]))  # type: ignore[union-attr]
                    return None
                announced = Frame(FrameKind.BLOCKS, nonce, 1, len(block)).encode()
                announced += encode_table([name], [piece_digest(block, nonce, *name)])
                await link._in_lane(lambda: link._send([announced, block[: len(block) // 2]]))  # type: ignore[union-attr]
        return None


async def main() -> None:
    peer = Peer(sys.argv[1])
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        try:
            answer = {"ok": await peer.obey(json.loads(line))}
        except PdserveError as error:
            answer = {"error": error.code}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    await peer.sender.close()


if __name__ == "__main__":
    asyncio.run(main())
