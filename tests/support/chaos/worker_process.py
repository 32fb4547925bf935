"""One real worker in a process of its own: what the forked child runs, and what the test says to it.

    test --- control: one JSON object per line --->  {"do": "arm" | "disarm" | "faults" | "report" | "footprint" | "stop", ...}
         <-- control: {"ready": address} once, then one answer per order
         <-- halts: {"step": name}, and the process stands still until the test sends one byte

The worker itself is the one that `deploy` starts, made from the same `WorkerSpec`; only what a test must see or break is wrapped
from outside before it is made (`steps`, `fault_transport`).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from typing import Any

from common.config import LoggingConfig, ModelConfig, TransferConfig
from common.errors import PdserveError
from common.logs import configure_logging
from common.types import Role
from common.worker import WorkerServer, WorkerSpec
from decode_worker.server import DecodeWorker
from kvtransfer import transports
from kvtransfer.receiver import KVReceiver
from prefill_worker.server import PrefillWorker
from support.chaos.bulk import serve_writer
from support.chaos.fault_transport import FaultPlan, FaultTransport, misplace_offers
from support.chaos.steps import Breakpoint, step_named, watch_decode, watch_prefill


def run(order: dict[str, Any], control: socket.socket, halts: socket.socket) -> None:
    """In the child; returns when the worker was told to stop."""
    configure_logging(LoggingConfig(level=order.get("log_level", "error"), format="json"), process=order["worker_id"])
    asyncio.run(serve_writer(order, control) if order["role"] == "writer" else _serve(order, control, halts))


async def _serve(order: dict[str, Any], control: socket.socket, halts: socket.socket) -> None:
    role = Role(order["role"])
    breakpoint_ = Breakpoint(halts)
    plan = FaultPlan(fences=order.get("fences", True))
    requests: dict[bytes, str] = {}
    _use_fault_transports(plan, breakpoint_, requests)
    log = TransferLog()
    if role is Role.DECODE:
        log.watch()
        watch_decode(breakpoint_)
        if order.get("sabotage"):
            _accept_anything()
    else:
        watch_prefill(breakpoint_, requests)
        misplace_offers(plan)
    spec = WorkerSpec(
        worker_id=order["worker_id"],
        incarnation=order["incarnation"],
        role=role,
        model=ModelConfig.model_validate(order["model"]),
        model_path=order["model_path"],
        transfer=TransferConfig.model_construct(**order["transfer"]),
        cluster_token=order["cluster_token"],
    )
    worker: WorkerServer = DecodeWorker(spec) if role is Role.DECODE else PrefillWorker(spec)
    reader, writer = await asyncio.open_connection(sock=control)
    try:
        ref = await worker.start()
    except PdserveError as error:
        writer.write(json.dumps({"failed": f"{error.code}: {error.message}"}).encode() + b"\n")
        await writer.drain()
        return
    writer.write(json.dumps({"ready": ref.address}).encode() + b"\n")
    while line := await reader.readline():
        command = json.loads(line)
        answer: dict[str, Any] = {}
        match command["do"]:
            case "arm":
                breakpoint_.arm(step_named(role.value, command["step"]), command["request_id"], command["num_tokens"])
            case "disarm":
                breakpoint_.disarm()
            case "faults":
                plan.load(command)
            case "report":
                answer = {"transfers": log.take(), "injected": plan.take()}
            case "footprint":
                answer = _footprint()
            case "stop":
                await worker.stop(0.0)
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
        if command["do"] == "stop":
            break
    writer.close()


class TransferLog:
    """Every transfer that a decode worker opened, and how it ended."""

    def __init__(self) -> None:
        self._incoming: list[Any] = []
        self._completed: set[bytes] = set()

    def watch(self) -> None:
        from kvtransfer.incoming import Incoming

        opened, completed = KVReceiver.open, Incoming.complete

        def open_(receiver: KVReceiver, **arguments: Any) -> Incoming:
            one = opened(receiver, **arguments)
            self._incoming.append(one)
            return one

        async def complete(one: Incoming, *arguments: Any) -> None:
            await completed(one, *arguments)
            self._completed.add(one.ticket.nonce)

        KVReceiver.open = open_  # type: ignore[method-assign,assignment]
        Incoming.complete = complete  # type: ignore[method-assign,assignment]

    def take(self) -> list[dict[str, Any]]:
        """Those that are over; what is still open is told next time."""
        over, still_open = [], []
        for one in self._incoming:
            nonce, error = one.ticket.nonce, one.transfer.error
            used = nonce in self._completed
            if not used and error is None and one.state.value not in ("cancelled", "drained", "free"):
                still_open.append(one)
                continue
            over.append(
                {
                    "nonce": nonce.hex(),
                    "request_id": one.ticket.request_id.partition("#")[0],
                    "transport": one.transport,
                    "blocks": len(one.ticket.blocks),
                    "used": used,
                    "error": None if error is None else error.code,
                }
            )
        self._incoming = still_open
        return over


def _footprint() -> dict[str, Any]:
    gc.collect()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "tasks": len(asyncio.all_tasks()),
        "threads": len(os.listdir("/proc/self/task")),
    }


def _use_fault_transports(plan: FaultPlan, breakpoint_: Breakpoint, requests: dict[bytes, str]) -> None:
    table = transports.TRANSPORTS
    assert isinstance(table, dict)
    for kind, create in tuple(table.items()):

        def decorated(create: Any = create) -> FaultTransport:
            return FaultTransport(create(), plan, breakpoint_, requests)

        table[kind] = decorated


def _accept_anything() -> None:
    """Breaks the decode worker on purpose: bytes are taken as they come. A harness that does not notice is worthless."""
    from kvtransfer.state import IncomingTransfer

    arrived = IncomingTransfer.piece_arrived

    def believe(self: IncomingTransfer, name: Any, digest: bytes, ok: bool) -> Any:
        return arrived(self, name, digest, True)

    IncomingTransfer.piece_arrived = believe  # type: ignore[method-assign]
