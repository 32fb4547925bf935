"""How commands ask a running cluster: one call to its manager, and its picture as plain values. Needs neither Ray nor torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from deploy.commands.which_cluster import chosen_state

if TYPE_CHECKING:
    from deploy.cluster_state import ClusterState

Reply = TypeVar("Reply")

CALL_TIMEOUT_S = 15.0


def cluster_status(cluster: str | None) -> dict[str, Any]:
    """What `status --json` prints. Raises ClusterError if no such cluster runs."""
    state = chosen_state(cluster)
    return describe(call_manager(state, ask_status), state)


def ask_status(stub: Any) -> Awaitable[Any]:
    from common.wire.registry_pb2 import StatusRequest

    reply: Awaitable[Any] = stub.Status(StatusRequest(refresh=True), timeout=CALL_TIMEOUT_S)
    return reply


def call_manager(state: ClusterState, call: Callable[[Any], Awaitable[Reply]]) -> Reply:
    """One call to the cluster's manager."""

    async def run() -> Reply:
        from common.rpc import connect

        channel = connect(state.manager_address, state.token)
        try:
            return await called(channel, state, call)
        finally:
            await channel.close(None)

    return asyncio.run(run())


async def called(channel: Any, state: ClusterState, call: Callable[[Any], Awaitable[Reply]]) -> Reply:
    """One call over a channel that is kept. Raises what the manager raised, or ClusterError if it cannot be asked."""
    import grpc.aio

    from common.errors import ClusterError, WorkerLost
    from common.rpc import error_from_rpc
    from common.wire.registry_pb2_grpc import ControlStub

    try:
        return await call(ControlStub(channel))
    except grpc.aio.AioRpcError as failed:
        if failed.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise ClusterError(f"cluster {state.cluster!r} runs another version of pdserve, which cannot do this") from failed
        error = error_from_rpc(failed)
        if isinstance(error, WorkerLost):
            raise ClusterError(
                f"the manager of cluster {state.cluster!r} does not answer at {state.manager_address}; is it ending?"
                " See: pdserve logs manager",
                param="cluster",
            ) from failed
        raise error from failed


def describe(snapshot: Any, state: ClusterState) -> dict[str, Any]:
    """The manager's picture, with what this machine knows of the processes."""
    from importlib.metadata import version as distribution_version

    from deploy.cluster_state import running_for_s

    return {
        "cluster": snapshot.cluster,
        "version": snapshot.version,
        "pdserve": distribution_version("pdserve"),
        "up_s": running_for_s(state.launcher_started),
        "config": state.config_path,
        "manager_address": state.manager_address,
        "manager_metrics_address": snapshot.manager_metrics_address,
        "models": [_model(one) for one in snapshot.models],
        "routers": [_router(one) for one in snapshot.routers],
        "workers": [_worker(one) for one in snapshot.workers],
        "events": [_event(one) for one in snapshot.events],
    }


def _model(model: Any) -> dict[str, Any]:
    return {
        "name": model.name,
        "context_tokens": model.context_tokens,
        "desired_prefill": model.desired_prefill,
        "desired_decode": model.desired_decode,
        "wakes_on_demand": model.wakes_on_demand,
        "awaits_successor": model.awaits_successor,
    }


def _router(router: Any) -> dict[str, Any]:
    return {
        "router_id": router.router_id,
        "http_address": router.http_address,
        "grpc_address": router.grpc_address,
        "pid": router.pid,
        "up_s": _up_s(router.http_address, router.pid),
    }


def _worker(worker: Any) -> dict[str, Any]:
    from common.codec import role_from_wire

    return {
        "worker_id": worker.worker_id,
        "model": worker.model,
        "role": role_from_wire(worker.role).value,
        "state": worker.state,
        "incarnation": worker.incarnation,
        "pid": worker.pid,
        "up_s": _up_s(worker.address, worker.pid),
        "address": worker.address,
        "metrics_address": worker.metrics_address,
        "blocks_total": worker.blocks_total,
        "blocks_free": worker.blocks_free,
        "blocks_in_transfer": worker.blocks_in_transfer,
        "leases_open": worker.leases_open,
        "requests_running": worker.requests_running,
        "requests_waiting": worker.requests_waiting,
        "requests_served": worker.requests_served,
        "max_model_tokens": worker.max_model_tokens,
        "device": worker.device,
        "dtype": worker.dtype,
        "exact": worker.exact,
        "tensor_parallel": worker.tensor_parallel,
        "pipeline_parallel": worker.pipeline_parallel,
        "rank_pids": list(worker.rank_pids),
        "failure": worker.failure,
    }


def _event(event: Any) -> dict[str, Any]:
    return {
        "sequence": event.sequence,
        "at_s": event.at_s,
        "kind": event.kind,
        "worker_id": event.worker_id,
        "model": event.model,
        "text": event.text,
    }


def _up_s(address: str, pid: int) -> float | None:
    """Of a process of this machine; None for one elsewhere."""
    from common.loopback import is_loopback
    from deploy.cluster_state import running_for_s, started_at

    if not pid or not is_loopback(address.rpartition(":")[0]):
        return None
    started = started_at(pid)
    return running_for_s(started) if started is not None else None
