"""Permission to write: minted by the decode worker that owns the blocks, checked by the prefill worker that was given it.

    cluster token --derive_secret--> transfer secret --HMAC-SHA256 over all fields--> Ticket.mac

The MAC covers a tagged encoding in which every field has one form and its length, so that no two tickets encode alike. The
check on the prefill side refuses a ticket that is forged, altered, meant for another worker or another incarnation of this one,
of another layout, or that points outside the pool. Whether the ticket is fresh is not decided here: the decode worker grants
each nonce once (`kvtransfer.receiver`).
"""

from __future__ import annotations

import hmac
import math
import secrets
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

from common.blocks import num_blocks
from common.errors import StartupError, TicketRefused
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.digest import NONCE_BYTES
from kvtransfer.part import check_part

MAX_TTL_S = 3600.0
_TAG = b"pdserve-ticket-v2"


def derive_secret(cluster_token: str) -> bytes:
    """The key of tickets and data links. Both workers derive it from the token that they share."""
    if not cluster_token:
        raise StartupError("the cluster token is empty: KV transfer needs a shared secret", param="cluster_token")
    return hmac.digest(cluster_token.encode(), b"pdserve-kv-v1", "sha256")


def mint(
    *,
    secret: bytes,
    layout: KVLayout,
    request_id: str,
    attempt: int,
    decode_worker_id: str,
    decode_incarnation: int,
    prefill: WorkerRef,
    first_block: int,
    blocks: Sequence[int],
    num_tokens: int,
    ttl_s: float,
    part: Sequence[int] = (),
    draw_nonce: Callable[[int], bytes] = secrets.token_bytes,
) -> Ticket:
    """A new ticket with a new nonce, for the blocks from `first_block` to the last of a prompt of `num_tokens`; `part` as in a
    `Ticket`."""
    unsigned = Ticket(
        nonce=draw_nonce(NONCE_BYTES),
        request_id=request_id,
        attempt=attempt,
        decode_worker_id=decode_worker_id,
        decode_incarnation=decode_incarnation,
        prefill_worker_id=prefill.worker_id,
        prefill_incarnation=prefill.incarnation,
        first_block=first_block,
        blocks=tuple(blocks),
        num_tokens=num_tokens,
        layout_fingerprint=layout.fingerprint,
        ttl_s=float(ttl_s),  # an int would encode differently after a trip over the wire
        part=tuple(part),
    )
    return replace(unsigned, mac=_mac(unsigned, secret))


def verify(
    ticket: Ticket,
    secret: bytes,
    *,
    layout: KVLayout,
    prefill_worker_id: str,
    prefill_incarnation: int,
    decode_worker_id: str,
    decode_incarnation: int,
    pool_blocks: int,
) -> None:
    """Raises TicketRefused with the offending field as `param`. The MAC comes first: nothing else of a forgery is believed."""
    if not hmac.compare_digest(_mac(ticket, secret), ticket.mac):
        raise TicketRefused("the ticket was not minted with the secret of this cluster, or was altered", param="mac")
    expected: tuple[tuple[str, object, object], ...] = (
        ("prefill_worker_id", ticket.prefill_worker_id, prefill_worker_id),
        ("prefill_incarnation", ticket.prefill_incarnation, prefill_incarnation),
        ("decode_worker_id", ticket.decode_worker_id, decode_worker_id),
        ("decode_incarnation", ticket.decode_incarnation, decode_incarnation),
        ("layout_fingerprint", ticket.layout_fingerprint.hex(), layout.fingerprint.hex()),
    )
    for field, stated, wanted in expected:
        if stated != wanted:
            raise TicketRefused(f"the ticket is for {field} {stated}, not {wanted}", param=field)
    check_shape(ticket, pool_blocks=pool_blocks, layout=layout)


def check_shape(ticket: Ticket, *, pool_blocks: int, layout: KVLayout) -> None:
    """What must hold of any ticket, whoever made it. Raises TicketRefused with the offending field as `param`."""
    if len(ticket.nonce) != NONCE_BYTES:
        raise TicketRefused(f"the nonce has {len(ticket.nonce)} bytes, not {NONCE_BYTES}", param="nonce")
    if not (math.isfinite(ticket.ttl_s) and 0 < ticket.ttl_s <= MAX_TTL_S):
        raise TicketRefused(f"a ticket lives more than 0 and at most {MAX_TTL_S:.0f} s, not {ticket.ttl_s} s", param="ttl_s")
    if ticket.num_tokens < 1:
        raise TicketRefused(f"a prompt of {ticket.num_tokens} tokens", param="num_tokens")
    if ticket.first_block < 0 or ticket.first_block + len(ticket.blocks) != num_blocks(ticket.num_tokens, layout.block_tokens):
        raise TicketRefused(
            f"{len(ticket.blocks)} blocks from block {ticket.first_block} do not end where {ticket.num_tokens} tokens end",
            param="first_block",
        )
    outside = next((block for block in ticket.blocks if not 0 <= block < pool_blocks), None)
    if outside is not None:
        raise TicketRefused(f"block {outside} is outside a pool of {pool_blocks} blocks", param="blocks")
    if len(set(ticket.blocks)) != len(ticket.blocks):
        raise TicketRefused("a block is named twice", param="blocks")
    check_part(ticket.part, layout.num_layers)


def _mac(ticket: Ticket, secret: bytes) -> bytes:
    return hmac.digest(secret, _encode(ticket), "sha256")


def _encode(ticket: Ticket) -> bytes:
    """Every field but the MAC, in declared order: name, kind, length, value. Raises TicketRefused for what has no encoding."""
    parts = [_TAG]
    for name in Ticket.__slots__:
        if name == "mac":
            continue
        value = getattr(ticket, name)
        try:
            kind, data = _encode_value(value)
        except struct.error as error:
            raise TicketRefused(f"{name} is out of range", param=name) from error
        parts.append(struct.pack("<B", len(name)) + name.encode() + kind + struct.pack("<Q", len(data)) + data)
    return b"".join(parts)


def _encode_value(value: object) -> tuple[bytes, bytes]:
    match value:
        case bytes():
            return b"b", value
        case str():
            return b"s", value.encode()
        case int():
            return b"i", struct.pack("<q", value)
        case float():
            return b"f", struct.pack("<d", value)
        case tuple():
            return b"t", struct.pack(f"<{len(value)}q", *value)
        case _:
            raise TicketRefused(f"a ticket does not hold a {type(value).__name__}")
