"""The router's process: binds its two ports, watches the registry, serves, drains.

    bind HTTP -> bind gRPC -> watch -> on_ready -> ... stop -> NOT_SERVING, refuse new work -> wait for what runs (grace)
                                                          -> abort the rest, typed -> close servers, links, watch

Nothing is shared between routers; any number of them may watch one manager.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from prometheus_client import CollectorRegistry

from common.clock import Clock, SystemClock
from common.config import Config, RouterConfig
from common.errors import ClusterError
from common.logs import get_logger
from common.metrics import RouterMetrics
from common.rpc import cancel_and_wait, start_server
from common.tracing.tracer import make_tracer
from common.wire import inference_pb2_grpc, registry_pb2
from router.cache.answers import AnswerCache
from router.console.console import Console
from router.dispatch import Dispatcher
from router.front import Front
from router.generation import InFlight
from router.grpc_front import SERVICE, InferenceServicer
from router.http_app import build_app
from router.placement.watching import Watching
from router.registry import Registry
from router.semantic.making import make_semantics
from router.store.making import make_store

log = get_logger(__name__)

DRAIN_GRACE_S = 30.0
_ABORTED_S = 5.0  # after the grace: for the typed errors of aborted streams to reach their clients
_CLOSING_S = 1.0  # for the last bytes of what has ended, and for calls that never end, such as health watches
_LONG_S = 3600.0
_BACKLOG = 2048
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
    clock = clock or SystemClock()
    tracer = make_tracer(config.tracing, service="pdserve-router", instance=uuid.uuid4().hex, clock=clock)
    prometheus = CollectorRegistry()
    metrics = RouterMetrics(prometheus)
    store = make_store(config.cache, cluster_token=cluster_token, clock=clock, metrics=metrics.store)
    registry = Registry(config, manager_address=manager_address, cluster_token=cluster_token, clock=clock)
    dispatcher = Dispatcher(config.router, registry, cluster_token=cluster_token, clock=clock, metrics=metrics)
    in_flight = InFlight()
    semantics = make_semantics(config.cache, store=store, clock=clock, metrics=metrics.semantic)
    cache = AnswerCache(
        config.cache,
        store=store,
        semantics=semantics,
        clock=clock,
        metrics=metrics,
        draining=lambda: in_flight.closed,
    )
    front = Front(
        config,
        registry=registry,
        dispatcher=dispatcher,
        cache=cache,
        semantics=semantics,
        in_flight=in_flight,
        metrics=metrics,
        tracer=tracer,
        clock=clock,
    )
    with _bound_socket(config.router) as listener:
        rpc = await start_server(
            lambda server: inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(front), server),
            host=config.router.grpc_host,
            port=config.router.grpc_port,
            token=None,
            services=(SERVICE,),
        )
        http_address = _address(config.router.http_host, listener)
        announcement = registry_pb2.WatchRequest(
            router_id=uuid.uuid4().hex, http_address=http_address, grpc_address=rpc.address, pid=os.getpid()
        )
        watching = asyncio.create_task(registry.run(announcement), name="watch registry")
        reports = Watching(
            config.router.placement,
            registry,
            dispatcher.placer,
            cluster_token=cluster_token,
            connect_timeout_s=config.router.connect_timeout_s,
            router_id=announcement.router_id,
            metrics=metrics,
        )
        watching_workers = asyncio.create_task(reports.run(), name="watch workers")
        storing = asyncio.create_task(store.run(), name="store")
        reading = asyncio.create_task(semantics.run(), name="semantic cache")
        console = None
        if config.router.console.enabled:
            console = Console(
                config,
                front=front,
                registry=registry,
                dispatcher=dispatcher,
                metrics=metrics,
                clock=clock,
                router_id=announcement.router_id,
                manager_address=manager_address,
                cluster_token=cluster_token,
            )
        showing = asyncio.create_task(console.run(), name="console") if console is not None else None
        observing = asyncio.create_task(front.observatory.run(), name="observatory")
        following = asyncio.create_task(_follow(registry, front, dispatcher), name="follow the registry")
        try:
            async with _http_server(build_app(front, prometheus, console), listener):
                on_ready(http_address, rpc.address)
                log.info("router is up", http=http_address, grpc=rpc.address)
                await stop.wait()
                front.in_flight.close()
                await rpc.set_serving(False)
                await _drain(front, dispatcher, drain_grace_s)
                if console is not None:
                    await console.close()
        finally:
            if showing is not None:
                await cancel_and_wait(showing)
            await rpc.stop(_CLOSING_S)
            await cancel_and_wait(watching_workers)
            await cancel_and_wait(following)
            await cancel_and_wait(observing)
            await cancel_and_wait(watching)
            await registry.close()
            await cache.close()
            await cancel_and_wait(reading)
            await semantics.close()
            await cancel_and_wait(storing)
            await dispatcher.close()
            await front.examination.close()
            await store.close()
            await tracer.close()
    log.info("router stopped")


async def _follow(registry: Registry, front: Front, dispatcher: Dispatcher) -> None:
    """What waits for room hears of workers that come; what is sent to a worker that is lost goes elsewhere."""
    while True:
        await registry.wait_changed(_LONG_S)
        front.gate.workers_changed()
        dispatcher.leave_lost()


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
    """uvicorn without its signal handlers: the process that embeds it decides what a signal means."""

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
