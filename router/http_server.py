"""The router's HTTP port: bound before anything is promised, served by uvicorn, and closed so that who was let in is answered.

    bind (`bound_socket`) -> serve (`http_server`) -> accept who is in the queue -> stop listening -> hear them -> close

It knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from common.config import RouterConfig
from common.errors import ClusterError

CLOSING_S = 1.0  # for the last bytes of what has ended, and for calls that never end, such as health watches
_BACKLOG = 2048
_HEARD_S = 0.3  # for the requests of connections that were made just before the last one was accepted
_KEEP_ALIVE_S = 65  # longer than the idle time of common load balancers


@contextmanager
def bound_socket(config: RouterConfig) -> Iterator[socket.socket]:
    """Listens from now on. Raises ClusterError if the port is taken."""
    family = socket.AF_INET6 if ":" in config.http_host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
        # Accepted sockets inherit it. Without it a small event waits 40 ms for the acknowledgement of the one before.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.bind((config.http_host, config.http_port))
        except OSError as error:
            where = f"{config.http_host}:{config.http_port}"
            raise ClusterError(f"cannot listen on {where}: {error.strerror}", param="router.http_port") from error
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        yield listener


def address_of(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def http_server(app: object, listener: socket.socket) -> AsyncIterator[None]:
    """Serves on a bound socket while the body runs; then stops accepting and closes what is open. Takes over `listener`."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]  # uvicorn spells the ASGI types out on its own
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(CLOSING_S),
    )
    server = _Server(config, listener)
    # Its own descriptor of the same port: when it closes that one, the queue stays, and who is in it can be let in.
    serving = asyncio.create_task(server.serve(sockets=[listener.dup()]), name="http server")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait([serving])
        serving.result()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process that embeds it decides what a signal means. And who has connected is
    heard: one whom nobody accepted yet, or without a request yet, would be reset or closed unanswered, and could not tell whether
    it was served."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self._listener = listener

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in self._last_connections():
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        if any(getattr(connection, "cycle", connection) is None for connection in self.server_state.connections):
            await asyncio.sleep(_HEARD_S)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def _last_connections(self) -> list[socket.socket]:
        """Who is in the queue. Closes the port right after it was seen to be empty: who connects between the two is reset."""
        accepted = []
        while True:
            try:
                accepted.append(self._listener.accept()[0])
            except ConnectionAbortedError:
                continue  # the client has left
            except OSError:  # the queue is empty, or there is no descriptor left
                self._listener.close()
                return accepted

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]  # as uvicorn calls it
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made
