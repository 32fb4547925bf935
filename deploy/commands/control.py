"""`pdserve status | scale | down`: talk to a running cluster. Needs neither Ray nor torch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import typer
from rich.table import Table

from deploy.commands.output import errors_as_lines, out, say

Reply = TypeVar("Reply")
ClusterName = Annotated[str, typer.Option("--cluster", help="Name of the cluster, as in its configuration.")]

_CALL_TIMEOUT_S = 15.0
_DOWN_TIMEOUT_S = 90.0


def status(
    cluster: ClusterName = "local",
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Shows routers and workers: state, process, blocks, open leases."""
    with errors_as_lines():
        described = cluster_status(cluster)
        if as_json:
            out.print_json(json.dumps(described))
        else:
            draw(described)


def scale(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill workers wanted.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode workers wanted.")] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until it is so; 0 returns at once.")] = 120.0,
    cluster: ClusterName = "local",
) -> None:
    """Changes how many workers a model has, while it serves."""
    from common.wire.registry_pb2 import ScaleRequest

    with errors_as_lines():
        if prefill is None and decode is None:
            raise typer.BadParameter("give --prefill, --decode or both")
        request = ScaleRequest(model=model, prefill=prefill, decode=decode, wait_s=wait)
        snapshot = call_manager(cluster, lambda stub: stub.Scale(request, timeout=wait + _CALL_TIMEOUT_S))
        draw(describe(snapshot))


def down(cluster: ClusterName = "local") -> None:
    """Stops a cluster that runs on this machine, and waits until all of it is gone."""
    from common.config import pdserve_home
    from common.errors import ClusterError
    from deploy.cluster_state import read_state, wait_until_gone

    with errors_as_lines():
        state = read_state(pdserve_home(), cluster)
        if state is None:
            say(f"no cluster {cluster!r} runs here")
        else:
            with suppress(ProcessLookupError):
                os.kill(state.launcher_pid, signal.SIGTERM)
        # Of a launcher that was killed, the janitor may still be at work.
        if not wait_until_gone(pdserve_home(), cluster, _DOWN_TIMEOUT_S):
            raise ClusterError(f"the cluster has not ended within {_DOWN_TIMEOUT_S:g} s; to force it, kill its launcher")
        if state is not None:
            say("stopped")


def cluster_status(cluster: str) -> dict[str, Any]:
    """What `status --json` prints. Raises ClusterError if no such cluster runs."""
    return describe(call_manager(cluster, _status))


def _status(stub: Any) -> Awaitable[Any]:
    from common.wire.registry_pb2 import StatusRequest

    reply: Awaitable[Any] = stub.Status(StatusRequest(refresh=True), timeout=_CALL_TIMEOUT_S)
    return reply


def call_manager(cluster: str, call: Callable[[Any], Awaitable[Reply]]) -> Reply:
    """One call to the cluster's manager."""
    import grpc.aio

    from common.config import pdserve_home
    from common.rpc import connect, error_from_rpc
    from common.wire.registry_pb2_grpc import ControlStub
    from deploy.cluster_state import running_state

    state = running_state(pdserve_home(), cluster)

    async def run() -> Reply:
        channel = connect(state.manager_address, state.token)
        try:
            return await call(ControlStub(channel))
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            await channel.close(None)

    return asyncio.run(run())


def describe(snapshot: Any) -> dict[str, Any]:
    from common.codec import role_from_wire

    return {
        "cluster": snapshot.cluster,
        "version": snapshot.version,
        "manager_metrics_address": snapshot.manager_metrics_address,
        "models": [
            {
                "name": model.name,
                "context_tokens": model.context_tokens,
                "desired_prefill": model.desired_prefill,
                "desired_decode": model.desired_decode,
            }
            for model in snapshot.models
        ],
        "routers": [
            {
                "router_id": router.router_id,
                "http_address": router.http_address,
                "grpc_address": router.grpc_address,
                "pid": router.pid,
            }
            for router in snapshot.routers
        ],
        "workers": [
            {
                "worker_id": worker.worker_id,
                "model": worker.model,
                "role": role_from_wire(worker.role).value,
                "state": worker.state,
                "incarnation": worker.incarnation,
                "pid": worker.pid,
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
                "failure": worker.failure,
            }
            for worker in snapshot.workers
        ],
    }


_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "failed": "red"}


def draw(described: dict[str, Any]) -> None:
    for router in described["routers"]:
        out.print(f"router  http://{router['http_address']}  gRPC {router['grpc_address']}  pid {router['pid']}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("worker", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("incarnation", "pid", "running", "waiting", "served", "blocks free", "leases"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("address", no_wrap=True)
    for worker in described["workers"]:
        table.add_row(
            worker["worker_id"],
            f"[{_STYLES.get(worker['state'], 'default')}]{worker['state']}[/]",
            str(worker["incarnation"]),
            str(worker["pid"]),
            str(worker["requests_running"]),
            str(worker["requests_waiting"]),
            str(worker["requests_served"]),
            f"{worker['blocks_free']} / {worker['blocks_total']}",
            str(worker["leases_open"]),
            worker["address"],
        )
    out.print(table)
    for worker in described["workers"]:
        if worker["failure"]:
            failed = worker["state"] == "failed"
            told = f"{worker['worker_id']}: {'given up' if failed else 'restarted'}: {worker['failure']}"
            out.print(told, style="red" if failed else "dim", markup=False, soft_wrap=True)
