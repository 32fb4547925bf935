"""One NIXL agent, as one end of one link uses it; and the ring of memory that its peer writes into.

    decode side     NixlAgent -> register(window) -> metadata ------> progress, progress ...                 -> close
    prefill side    NixlAgent -> meet(metadata) -> register(sources) -> post -> finished? -> post -> ...     -> close

Each link has agents of its own, so that closing one ends all that its link could still read or write by itself: sources may be
freed, and over sockets or shared memory nothing more arrives. Only where the kernel copies from process to process (cma), a peer
that has not heard of it yet still writes to the addresses that it knows: the memory must stay mapped until the peer has let go.

An agent has no thread: one call at a time, from any thread. No call waits for the peer, so a peer that was stopped holds none
up; a call does move bytes, and lets go of the GIL while it does.

The environment of the process may overrule which lanes UCX takes (`UCX_TLS`, `UCX_NET_DEVICES`, ...); NIXL gives it precedence.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from common.errors import StartupError, TransferBroken

# Between two workers of one host UCX needs no socket: without tcp it opens none, and neither end must answer for the other to go
# on. It cannot watch over a peer that way ("none"), which the link's own socket does.
_SAME_HOST = {"engine_config": "TLS=^tcp,NET_DEVICES=lo", "ucx_error_handling_mode": "none"}
_NETWORK = {"ucx_error_handling_mode": "peer"}
_NO_TRANSFER = 0
_loading = threading.Lock()

Result = TypeVar("Result")


def load_nixl() -> Any:
    """The bindings of the library; slow the first time. Raises StartupError if it is not installed."""
    with _loading:  # two at once would each take the other's state of logging for what it was before
        first = "nixl_cu13" not in sys.modules
        raise_exceptions = logging.raiseExceptions
        try:
            bindings = importlib.import_module("nixl_cu13._bindings")
        except ImportError as error:
            raise StartupError("KV transfer over NIXL needs more: pip install pdserve[nixl]", param="transports") from error
        if first:  # the package around them takes over standard output for its messages, and a switch of everybody's logging
            logging.raiseExceptions = raise_exceptions
            logger = logging.getLogger("nixl")
            logger.handlers.clear()
            logger.propagate = True
    return bindings


class NixlAgent:
    """Speaks to the bindings and not to the classes around them: those refer to the agent from handles and tracebacks, and an
    agent ends when nothing refers to it any more. Here only `self._agent` does."""

    def __init__(self, name: str, *, same_host: bool) -> None:
        """Slow. Raises StartupError if NIXL cannot be used here."""
        self._nixl = load_nixl()
        kinds = [kind for kind in vars(self._nixl).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        self._failures: tuple[type[Exception], ...] = (*kinds, RuntimeError, ValueError, TypeError, AttributeError)
        self._peer = ""
        self._transfer = _NO_TRANSFER
        self._registered: list[tuple[int, int, memoryview]] = []  # address, size, what keeps it alive
        self._agent: Any = None
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = False  # it would spin
        config.useListenThread = False
        config.captureTelemetry = False
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_NONE
        try:
            self._agent = self._nixl.nixlAgent(name, config)
            self._agent.createBackend("UCX", _SAME_HOST if same_host else _NETWORK)
        except self._failures as error:
            self._agent = None
            raise StartupError(f"NIXL does not work here: {error}", param="transports") from error

    def register(self, memory: memoryview) -> int:
        """Lets NIXL read and write all of `memory` from now on; returns its address. Keeps it alive until `close`."""
        address, size = _place(memory)
        self._call(lambda: self._agent.registerMem(self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(address, size, 0, "")])))
        self._registered.append((address, size, memory))
        return address

    def address_of(self, source: memoryview) -> int:
        """Where `source` is. Memory that is seen for the first time is registered, with all that it is a part of."""
        address, size = _place(source)
        if not any(start <= address and address + size <= start + length for start, length, _ in self._registered):
            whole: Any = source.obj
            self.register(np.frombuffer(whole, dtype=np.uint8).data)
        return address

    def metadata(self) -> bytes:
        """What a peer needs to write into the registered memory."""
        metadata: bytes = self._call(lambda: self._agent.getLocalMD())
        return metadata

    def meet(self, metadata: bytes) -> None:
        """Raises TransferBroken if no lane leads to the agent that `metadata` is of."""
        name: bytes = self._call(lambda: self._agent.loadRemoteMD(metadata))
        self._peer = name.decode(errors="replace")

    def post(self, sources: Sequence[tuple[int, int]], destinations: Sequence[int]) -> bool:
        """Begins to write `sources` (address, size) to addresses of the peer's; whether it is done already. One at a time."""
        local = np.zeros((len(sources), 3), dtype=np.uint64)  # address, size, device
        local[:, :2] = sources
        remote = local.copy()
        remote[:, 0] = destinations

        def begin() -> Any:
            nixl = self._nixl
            self._transfer = self._agent.createXferReq(
                nixl.NIXL_WRITE,
                nixl.nixlXferDList(nixl.DRAM_SEG, local),
                nixl.nixlXferDList(nixl.DRAM_SEG, remote),
                self._peer,
            )
            return self._agent.postXferReq(self._transfer)

        return self._judge(self._call(begin))

    def finished(self) -> bool:
        """Whether what was posted is done: the sources may be overwritten. Raises TransferBroken if the peer is gone."""
        return self._judge(self._call(lambda: self._agent.getXferStatus(self._transfer)))

    def progress(self) -> None:
        """Moves bytes that wait for this end. Does not wait for more."""
        self._call(lambda: self._agent.getNotifs({}))

    def close(self) -> None:
        """When it returns, the agent reads and writes nothing any more. Idempotent."""
        if self._transfer != _NO_TRANSFER:
            with contextlib.suppress(TransferBroken):  # what it cannot cancel ends with the agent
                self._call(lambda: self._agent.releaseXferReq(self._transfer))
            self._transfer = _NO_TRANSFER
        self._agent = None
        self._registered.clear()

    def _judge(self, state: Any) -> bool:
        if state == self._nixl.NIXL_IN_PROG:
            return False
        self._call(lambda: self._agent.releaseXferReq(self._transfer))
        self._transfer = _NO_TRANSFER
        return True  # the bindings raise whatever is not a success

    def _call(self, call: Callable[[], Result]) -> Result:
        """Any failure of NIXL's as an error of ours."""
        if self._agent is None:
            raise TransferBroken("the link was closed")
        try:
            return call()
        except self._failures as error:
            raise TransferBroken(f"NIXL failed: {error}") from error


class Ring:
    """Where the next pieces go in a window of memory, counted alike by both ends: one after the other, and from the start again
    where the rest of the window is too small for a piece. What is left empty there costs, too."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.free_bytes = size_bytes
        self._head = 0

    def places(self, sizes: Sequence[int]) -> tuple[list[int], int]:
        """The offsets of the next pieces, and what they cost. A cost above `size_bytes` cannot be met."""
        head, cost_bytes = self._head, 0
        offsets = []
        for size in sizes:
            if head + size > self.size_bytes:
                cost_bytes += self.size_bytes - head
                head = 0
            offsets.append(head)
            head += size
            cost_bytes += size
        return offsets, cost_bytes

    def take(self, sizes: Sequence[int]) -> tuple[list[int], int]:
        """As `places`, and from now on they are taken, until their cost is added to `free_bytes` again."""
        offsets, cost_bytes = self.places(sizes)
        self._head = offsets[-1] + sizes[-1]
        self.free_bytes -= cost_bytes
        return offsets, cost_bytes


def _place(memory: memoryview) -> tuple[int, int]:
    array: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)
    return array.ctypes.data, array.nbytes
