"""A rank other than 0: a process without ports, files or a will of its own.

    inherited sockets -> order from rank 0 -> share built -> "ready" -> steps, until STOP or until rank 0 is gone

It ends with rank 0, however that ends: the kernel kills it when its parent dies, and a thread watches a socket whose other end
only rank 0 has. On that socket it gives a sign of life, also while it loads and computes; rank 0 kills a rank that does not.
Another thread may run something beside the share, over the rank's pool (`Beside`); if that ends by a mistake, so does the rank.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any, Protocol

from common.config import LoggingConfig
from common.engine.device_memory import DeviceAllocation
from common.engine.parallel.group import PULSE_S
from common.engine.parallel.links import LINK_TIMEOUT_S, Link
from common.engine.parallel.messages import CopyOrder, MoveOrder, StepOrder, StopOrder, SwapOrder, decode
from common.engine.parallel.model import ShareLinks, ShareOrder, build_share
from common.engine.parallel.stage import StageShare
from common.engine.parallel.sums import as_bytes
from common.engine.pool_memory import BlockMemory
from common.errors import PdserveError, RankLost
from common.logs import configure_logging, get_logger

_PR_SET_PDEATHSIG = 1
_log = get_logger(__name__)


class Beside(Protocol):
    """What else the process runs, and where the rank's pool lies for it."""

    @property
    def memory(self) -> BlockMemory: ...

    def serve(self, end: socket.socket, device_memory: DeviceAllocation | None, block_bytes: int) -> None:
        """Given one end of a socket pair, whose other end rank 0 has, once the pool is there. Runs until the other end is
        closed, and owns `end`."""
        ...


def main(beside: Beside | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for rank 0
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != arguments.parent:
        return 1  # it died before we could ask
    threading.excepthook = _thread_failed
    control = _link(arguments.control, "rank 0")
    try:
        setup = json.loads(control.receive())
        configure_logging(LoggingConfig(), process=f"{setup['name']} rank {setup['order']['rank']}")
        threading.Thread(target=_live, args=(socket.socket(fileno=setup["life"]),), name="life", daemon=True).start()
        share = _build(setup, beside)
        _say_ready(control)
        control.wait()  # for the last of them, which may take longer than a message
        control.receive()
        share.connect()
        _say_ready(control)
    except PdserveError as error:
        with suppress(RankLost):  # rank 0 may be gone
            control.send(json.dumps({"error": error.code, "message": error.message, "param": error.param}).encode())
        return 1
    try:
        serve(control, share)
        share.close()
    except RankLost as error:
        _log.error("the group of this rank is gone", reason=error.message)
        return 1
    return 0


def _say_ready(control: Link) -> None:
    control.send(json.dumps({}).encode())


def _build(setup: dict[str, Any], beside: Beside | None) -> StageShare:
    order = ShareOrder.decode(setup["order"])
    links = ShareLinks(
        shards={int(shard): _link(fd, f"shard {shard}") for shard, fd in setup["shards"].items()},
        previous=None if setup["previous"] is None else _link(setup["previous"], "the stage before"),
        following=None if setup["following"] is None else _link(setup["following"], "the next stage"),
    )
    share = build_share(order, None if beside is None else beside.memory, links)
    if beside is not None:
        arguments = socket.socket(fileno=setup["beside"]), share.device_memory, share.pool.layout.block_bytes
        threading.Thread(target=beside.serve, args=arguments, name="beside", daemon=True).start()
    return share


def serve(control: Link, share: StageShare) -> None:
    """Carries out what rank 0 orders, until that is to stop."""
    while True:
        control.wait()
        match decode(control.receive()):
            case StepOrder() as order:
                _compute(control, share, order)
            case CopyOrder(source, destination):
                share.copy_block(source, destination)
            case SwapOrder(num_slots):
                share.make_swap_region(num_slots)
            case MoveOrder(brought_in, put_out):
                share.move(brought_in, put_out)
                control.send(b"")
            case StopOrder():
                return


def _compute(control: Link, share: StageShare, order: StepOrder) -> None:
    tells = order.watched and share.share.shard == 0 and not share.share.is_first
    compute = share.compute_part if order.is_part else share.compute
    hidden = compute(order.batch, (lambda _: control.send(b"")) if tells else None)
    if hidden is None:
        return
    for rows in order.wanted:
        control.send(as_bytes(share.logits(hidden, rows).cpu()))
    if order.kept and share.share.shard == 0:
        control.send(as_bytes(share.rows(hidden, order.kept).cpu()))
    if order.ends_step and not order.wanted:
        share.settle()
        control.send(b"")  # that all is computed


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    _log.error("a thread of a rank failed", error=repr(arguments.exc_value))
    os._exit(1)  # the main thread may be anywhere


def _live(life: socket.socket) -> None:
    """Rank 0 never writes here: what can be read is the end."""
    poller = select.poll()
    poller.register(life, select.POLLIN)
    while True:
        try:
            with suppress(BlockingIOError):  # rank 0 has not looked for a while: what is there will do
                life.send(b".", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            break
        if poller.poll(PULSE_S * 1000.0):
            break
    os._exit(1)  # the main thread may be anywhere


def _link(descriptor: int, peer: str) -> Link:
    return Link(socket.socket(fileno=descriptor), peer, LINK_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
