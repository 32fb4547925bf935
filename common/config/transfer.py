"""How KV travels from prefill to decode workers (`kvtransfer`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.part import Part


class TransferConfig(Part):
    """How KV travels from prefill to decode workers."""

    transports: tuple[Literal["shm", "cuda_ipc", "tcp", "tcp_int8", "tcp_fp8", "nixl"], ...] = Field(
        ("cuda_ipc", "shm", "tcp"),
        min_length=1,
        description="Offered by decode workers, in order of preference, as far as their pool's memory can serve them: on a"
        " GPU that is cuda_ipc, elsewhere the others. nixl needs pdserve[nixl]. tcp_int8 and tcp_fp8 send a byte a value, which"
        " is lossy: for slow networks, not in exact mode.",
    )
    lease_s: float = Field(
        4.0, gt=0, description="A worker that is silent for so long during a transfer is given up by the other."
    )
    ticket_ttl_s: float = Field(60.0, gt=0, description="A remote prefill that takes longer has failed.")
    handshake_timeout_s: float = Field(5.0, gt=0, description="Budget for the first contact of two workers.")
    release_timeout_s: float = Field(2.0, gt=0, description="How long to wait for a writer's promise to stop, per try.")
