"""Unix sockets with abstract names: a process on this host finds them by name, and a kill leaves nothing behind.

They carry handles, descriptors and frames; of KV no more than what was made for a peer. Who may connect is `authentication`'s
business.
"""

from __future__ import annotations

import asyncio
import socket

from common.errors import StartupError, TransferBroken
from kvtransfer.transports.authentication import AUTHENTICATION_TIMEOUT_S

_BACKLOG = 64


def listen_at(name: str) -> socket.socket:
    """Raises StartupError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind("\0" + name)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise StartupError(f"no Unix socket for KV transfer: {error.strerror}", param="transports") from error
    return sock


async def connect_to(sock: socket.socket, name: str) -> None:
    """`sock` stays the caller's. Raises TransferBroken."""
    sock.setblocking(False)
    try:
        async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(sock, "\0" + name)
    except (OSError, ValueError) as error:
        raise TransferBroken("no decode worker on this host listens at the offered address") from error
