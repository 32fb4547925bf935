"""The router's process: binds its two ports, watches the registry, serves, drains.

    bind HTTP -> bind gRPC -> watch -> on_ready -> ... stop -> NOT_SERVING, refuse new work -> wait for what runs (grace)
                                                          -> abort the rest, typed -> let in who waits, stop listening, hear them
                                                          -> close servers, links, watch

Nothing is shared between routers; any number of them may watch one manager.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

from common.clock import Clock, SystemClock
from common.config import Config
from common.logs import get_logger
from common.rpc import start_server
from common.wire import inference_pb2_grpc, registry_pb2
from router.assembly import assemble
from router.dispatch import Dispatcher
from router.front import Front
from router.grpc_front import SERVICE, InferenceServicer
from router.http_app import build_app
from router.http_server import CLOSING_S, address_of, bound_socket, http_server

log = get_logger(__name__)

DRAIN_GRACE_S = 30.0
_ABORTED_S = 5.0  # after the grace: for the typed errors of aborted streams to reach their clients


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
        listener = ending.enter_context(bound_socket(config.router))
        rpc = await start_server(
            lambda server: inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(front), server),
            host=config.router.grpc_host,
            port=config.router.grpc_port,
            token=None,
            services=(SERVICE,),
        )
        http_address = address_of(config.router.http_host, listener)
        router.start(
            registry_pb2.WatchRequest(router_id=router_id, http_address=http_address, grpc_address=rpc.address, pid=os.getpid()),
            ending,
        )
        ending.push_async_callback(rpc.stop, CLOSING_S)
        async with http_server(build_app(front, router.prometheus, console), listener):
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
