"""A decode worker's transfer end in a process of its own, to be stopped and killed. Obeys JSON lines on stdin, answers each.

{"do": "start", "kind"} -> address · {"do": "open", "prefill", "blocks", "ttl_s"} -> ticket · {"do": "verified"} -> their number
{"do": "complete", "num_tokens", "digests"} -> the first bytes of each block · {"do": "failed"} -> the error, once there is one
{"do": "abandon"} -> the blocks, once no writer can touch them; the writer is not asked
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

from common.clock import SystemClock
from common.errors import PdserveError
from common.types import KVLayout, WorkerRef
from kvtransfer.receiver import Incoming, KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret

LAYOUT = KVLayout("model", "tokenizer", 16, 4, 32, 16, "float32", True)  # 256 KiB a block
POOL_BLOCKS = 64


class Peer:
    def __init__(self, worker_id: str) -> None:
        self.region = BlockRegion.create_shared(LAYOUT.block_bytes, POOL_BLOCKS)
        self.receiver = KVReceiver(self.region, LAYOUT, worker_id, 1, derive_secret("token"), SystemClock())
        self.incoming: Incoming | None = None

    async def ask_nobody(self) -> None:
        """The writer must notice by itself."""

    async def obey(self, order: dict[str, Any]) -> Any:
        match order["do"]:
            case "start":
                return (await self.receiver.start([order["kind"]], "127.0.0.1"))[0].address
            case "open":
                self.incoming = self.receiver.open(
                    request_id="r",
                    attempt=0,
                    prefill=WorkerRef(order["prefill"], 1, "unused"),
                    first_block=0,
                    blocks=order["blocks"],
                    num_tokens=16 * len(order["blocks"]),
                    ttl_s=order["ttl_s"],
                )
                ticket = asdict(self.incoming.ticket)
                return {name: value.hex() if isinstance(value, bytes) else value for name, value in ticket.items()}
            case "verified" if self.incoming is not None:
                return self.incoming.num_blocks
            case "failed" if self.incoming is not None:
                return (await self.incoming.wait_failed()).code
            case "abandon" if self.incoming is not None:
                return list(await self.incoming.abandon(self.ask_nobody, tries=1, timeout_s=0.0))
            case "complete" if self.incoming is not None:
                digests = {int(logical): bytes.fromhex(digest) for logical, digest in order["digests"].items()}
                await self.incoming.complete(Seal(self.incoming.ticket.nonce, order["num_tokens"], digests))
                return [bytes(self.region.block(block)[:8]).hex() for block in self.incoming.ticket.blocks]
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
    await peer.receiver.close()


if __name__ == "__main__":
    asyncio.run(main())
