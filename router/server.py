"""The router's process: binds its two ports, watches the registry, serves, drains.

    bind HTTP -> bind gRPC -> watch -> on_ready -> ... stop -> NOT_SERVING, refuse new work -> wait for what runs (grace)
                                                          -> abort the rest, typed -> stop listening, hear who was let in
                                                          -> close servers, links, watch

Nothing is shared between routers; any number of them may watch one manager.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

import uvicorn

from common.clock import Clock, SystemClock
from common.config import Config, RouterConfig
from common.errors import ClusterError
from common.logs import get_logger
from common.rpc import start_server
from common.wire import inference_pb2_grpc, registry_pb2
from router.assembly import assemble
from router.dispatch import Dispatcher
from router.front import Front
from router.grpc_front import SERVICE, InferenceServicer
from router.http_app import build_app

log = get_logger(__name__)

DRAIN_GRACE_S = 30.0
_ABORTED_S = 5.0  # after the grace: for the typed errors of aborted streams to reach their clients
_CLOSING_S = 1.0  # for the last bytes of what has ended, and for calls that never end, such as health watches
_BACKLOG = 2048
_HEARD_S = 0.3  # for the requests of connections that were made just before the last one was accepted
_KEEP_ALIVE_S = 65  # longer than the idle time of common load balancers


async def run(
    config: Config,
    *,
    manager_address: str,
    cluster_token: str,
    stop: asyncio.Event,
    on_ready: Callable[[str, str], None],
    clock: Clock | None = None,
    drain_grace_s: float = DRAIN_GRACE_S,
) -> None:
    """Serves until `stop` is set and everything is drained. `on_ready` gets the addresses (HTTP, gRPC) that are now served.

    Raises ClusterError if a port is taken.
    """
    router_id = uuid.uuid4().hex
    router = assemble(
        config,
        manager_address=manager_address,
        cluster_token=cluster_token,
        router_id=router_id,
        clock=clock or SystemClock(),
    )
    front, console = router.front, router.console
    async with AsyncExitStack() as ending:
        listener = ending.enter_context(_bound_socket(config.router))
        rpc = await start_server(
            lambda server: inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(front), server),
            host=config.router.grpc_host,
            port=config.router.grpc_port,
            token=None,
            services=(SERVICE,),
        )
        http_address = _address(config.router.http_host, listener)
        router.start(
            registry_pb2.WatchRequest(router_id=router_id, http_address=http_address, grpc_address=rpc.address, pid=os.getpid()),
            ending,
        )
        ending.push_async_callback(rpc.stop, _CLOSING_S)
        async with _http_server(build_app(front, router.prometheus, console), listener):
            on_ready(http_address, rpc.address)
            log.info("router is up", http=http_address, grpc=rpc.address)
            await stop.wait()
            front.in_flight.close()
            await rpc.set_serving(False)
            await _drain(front, router.dispatcher, drain_grace_s)
            if console is not None:
                await console.close()
    log.info("router stopped")


async def _drain(front: Front, dispatcher: Dispatcher, grace_s: float) -> None:
    """Waits for what is in flight; what is not done after the grace ends in a typed error."""
    if front.in_flight.idle.is_set():
        return
    log.info("draining", in_flight=dict(front.in_flight.by_model), grace_s=grace_s)
    with suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            await front.in_flight.idle.wait()
        return
    log.warning("grace is over, aborting", in_flight=dict(front.in_flight.by_model))
    front.gate.abort_all()
    dispatcher.abort_all()
    with suppress(TimeoutError):
        async with asyncio.timeout(_ABORTED_S):
            await front.in_flight.idle.wait()


@contextmanager
def _bound_socket(config: RouterConfig) -> Iterator[socket.socket]:
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
        yield listener


def _address(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the process that embeds it decides what a signal means. And who was let in just now is
    heard: a connection without a request yet would be closed unanswered, and its client could not tell whether it was served."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        if any(getattr(connection, "cycle", connection) is None for connection in self.server_state.connections):
            await asyncio.sleep(_HEARD_S)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def _http_server(app: object, listener: socket.socket) -> AsyncIterator[None]:
    """Serves on a bound socket while the body runs; then stops accepting and closes what is open."""
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]  # uvicorn spells the ASGI types out on its own
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(_CLOSING_S),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="http server")
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.wait([serving])
        serving.result()
