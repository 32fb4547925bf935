"""`prefill_peer` with a trap: it stops or kills itself at one point of its next write over NIXL.

{"do": "trap", "where": "before" | "after" | "within", "signal"}: before the bytes move; after they have, but nobody was told;
within, when NIXL was asked whether it is done (only a lane that needs the other end's help gets there).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import prefill_peer  # the directory of a script is on its path

from kvtransfer.transports.nixl_agent import NixlAgent


def spring(signal: int) -> None:
    os.kill(os.getpid(), signal)
    time.sleep(0.5)  # this thread would go on for a moment: the process stops when all of its threads have noticed
    time.sleep(0.5)  # after a stop the other threads go first: they hear what has happened meanwhile


def set_trap(where: str, signal: int) -> None:
    post, finished = NixlAgent.post, NixlAgent.finished

    def once(spring_before: bool, call: Callable[..., bool], *arguments: Any) -> bool:
        NixlAgent.post, NixlAgent.finished = post, finished  # type: ignore[method-assign]
        if spring_before:
            spring(signal)
        result = call(*arguments)
        if not spring_before:
            spring(signal)
        return result

    def trapped_post(*arguments: Any) -> bool:
        return once(where == "before", post, *arguments)

    def trapped_finished(*arguments: Any) -> bool:
        return once(True, finished, *arguments)

    if where == "within":
        NixlAgent.finished = trapped_finished  # type: ignore[method-assign]
    else:
        NixlAgent.post = trapped_post  # type: ignore[method-assign]


class TrappedPeer(prefill_peer.Peer):
    async def obey(self, order: dict[str, Any]) -> Any:
        if order["do"] == "trap":
            set_trap(order["where"], order["signal"])
            return None
        return await super().obey(order)


if __name__ == "__main__":
    prefill_peer.Peer = TrappedPeer  # type: ignore[misc]
    asyncio.run(prefill_peer.main())
