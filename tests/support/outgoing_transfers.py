"""A transfer of the prefill side over a link that the test made, without a worker around it."""

from __future__ import annotations

from collections.abc import Callable

from common.clock import SystemClock
from common.types import KVLayout, Ticket
from kvtransfer.outgoing import Outgoing, SourceSide
from kvtransfer.region import BlockRegion
from kvtransfer.transports.base import SenderLink

LAYOUT = KVLayout("model", "tokenizer", 2, 1, 8, 16, "float32", True)
BLOCKS = 2
PATIENCE_S = 120.0


def sources() -> BlockRegion:
    return BlockRegion(memoryview(bytearray(b"s" * BLOCKS * LAYOUT.block_bytes)), LAYOUT.block_bytes, BLOCKS)


def outgoing_over(
    link: SenderLink,
    region: BlockRegion | None = None,
    *,
    forget: Callable[[bytes], object] = lambda nonce: None,
    lease_s: float = PATIENCE_S,
    ttl_s: float = PATIENCE_S,
) -> Outgoing:
    """Of all blocks of `region`, or of `sources()`. `forget` hears the nonce once the transfer is over."""
    ticket = Ticket(
        nonce=b"n" * 16,
        request_id="r",
        attempt=0,
        decode_worker_id="d",
        decode_incarnation=1,
        prefill_worker_id="p",
        prefill_incarnation=1,
        first_block=0,
        blocks=tuple(range(BLOCKS)),
        num_tokens=BLOCKS * LAYOUT.block_tokens,
        layout_fingerprint=LAYOUT.fingerprint,
        ttl_s=ttl_s,
    )
    side = SourceSide(
        region=sources() if region is None else region,
        num_layers=LAYOUT.num_layers,
        clock=SystemClock(),
        lease_s=lease_s,
        forget=forget,
        silent=lambda link: None,
        expired=lambda: None,
    )

    async def enter(outgoing: Outgoing) -> SenderLink:
        outgoing.entering(link)
        await link.open_writer(ticket.nonce, outgoing)
        return link

    return Outgoing(ticket, side, enter)
