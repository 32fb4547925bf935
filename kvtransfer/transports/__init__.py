"""The links that KV travels over, one file each, behind one interface (`base`), and the table of them.

| kind     | for                     | how                                               | a writer that does not answer |
|----------|-------------------------|---------------------------------------------------|-------------------------------|
| inproc   | tests, simulations      | copies within the process                         | its link must end             |
| shm      | two processes, one host | copied out of the peer's pool, which is mapped    | is fenced at once             |
| cuda_ipc | two processes, one GPU  | the peer opens the pool; one launch for a batch   | its process must end or go on |
| tcp      | anywhere                | bytes pass through the owner of the pool          | is fenced at once             |
| tcp_int8 | slow networks           | as tcp, a byte a value: lossy (`wire_dtype`)      | is fenced at once             |
| tcp_fp8  | likewise                | likewise                                          | is fenced at once             |
| nixl     | RDMA, NVLink; anywhere  | one-sided writes into a window, then one memcpy   | is fenced at once             |

Pools on a GPU are served by cuda_ipc alone, pools in host memory by the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from common.errors import HandshakeRefused
from kvtransfer.transports.base import Transport


def _inproc() -> Transport:
    from kvtransfer.transports.inproc import InprocTransport

    return InprocTransport()


def _shm() -> Transport:
    from kvtransfer.transports.shm import ShmTransport

    return ShmTransport()


def _cuda_ipc() -> Transport:
    from kvtransfer.transports.cuda_ipc import CudaIpcTransport

    return CudaIpcTransport()


def _tcp() -> Transport:
    from kvtransfer.transports.tcp import TcpTransport

    return TcpTransport()


def _tcp_coded(kind: str) -> Transport:
    from kvtransfer.transports.tcp_coded import CodedTcpTransport

    return CodedTcpTransport(kind)


def _nixl() -> Transport:
    from kvtransfer.transports.nixl import NixlTransport

    return NixlTransport()


LOSSY = frozenset({"tcp_int8", "tcp_fp8"})
"""Not what was sent arrives, but what its codes mean: only for those who ask for it."""

TRANSPORTS: Mapping[str, Callable[[], Transport]] = {
    "inproc": _inproc,
    "shm": _shm,
    "cuda_ipc": _cuda_ipc,
    "tcp": _tcp,
    "tcp_int8": partial(_tcp_coded, "tcp_int8"),
    "tcp_fp8": partial(_tcp_coded, "tcp_fp8"),
    "nixl": _nixl,
}


def create_transport(kind: str, transports: Mapping[str, Callable[[], Transport]] = TRANSPORTS) -> Transport:
    creator = transports.get(kind)
    if creator is None:
        raise HandshakeRefused(f"no transport {kind!r}; known are {', '.join(transports)}", param="transports")
    return creator()
