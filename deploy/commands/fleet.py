"""`pdserve drain | flip | roll | autoscaler`: change the workers of a running cluster without losing a request, or see who
does."""

from __future__ import annotations

import enum
import json
import time
from typing import Annotated, Any

import typer
from rich.table import Table

from deploy.commands.control import ClusterName, call_manager, describe, draw
from deploy.commands.output import errors_as_lines, out

_CALL_TIMEOUT_S = 15.0
WorkerName = Annotated[str, typer.Argument(help="Id of the worker, as `pdserve status` shows it.")]
Wait = Annotated[float, typer.Option(min=0, help="Seconds to wait until it is so; 0 returns at once.")]


class RoleName(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class ModeName(enum.StrEnum):
    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"


def drain(worker: WorkerName, wait: Wait = 180.0, cluster: ClusterName = "local") -> None:
    """Replaces a worker: another takes its place, its requests finish or go on elsewhere, its process ends."""
    from common.wire.registry_pb2 import DrainWorkerRequest

    request = DrainWorkerRequest(worker_id=worker, wait_s=wait)
    _change(cluster, lambda stub: stub.Drain(request, timeout=wait + _CALL_TIMEOUT_S))


def flip(
    worker: WorkerName,
    role: Annotated[RoleName, typer.Argument(help="What it is to be.")],
    wait: Wait = 120.0,
    cluster: ClusterName = "local",
) -> None:
    """Makes a prefill worker of a decode worker, or the other way round. It keeps its process and its weights."""
    from common.wire.registry_pb2 import FlipRequest

    request = FlipRequest(worker_id=worker, role=_role_to_wire(role), wait_s=wait)
    _change(cluster, lambda stub: stub.Flip(request, timeout=wait + _CALL_TIMEOUT_S))


def roll(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    role: Annotated[RoleName | None, typer.Option(help="Only the workers of this role.")] = None,
    wait: Wait = 600.0,
    cluster: ClusterName = "local",
) -> None:
    """Replaces all workers of a model one by one, while it serves."""
    from common.wire.registry_pb2 import RollRequest

    request = RollRequest(model=model, role=_role_to_wire(role), wait_s=wait)
    _change(cluster, lambda stub: stub.Roll(request, timeout=wait + _CALL_TIMEOUT_S))


def autoscaler(
    model: Annotated[str, typer.Argument(help="Name of the model; all without it.")] = "",
    mode: Annotated[
        ModeName | None, typer.Option(help="How it is to work from now on; dry-run only says what it would do.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    cluster: ClusterName = "local",
) -> None:
    """Shows what the autoscaler sees, what it decided and why; switches it."""
    from common.wire.registry_pb2 import AutoscalerRequest

    with errors_as_lines():
        request = AutoscalerRequest(model=model, mode=_mode_to_wire(mode))
        report = call_manager(cluster, lambda stub: stub.Autoscaler(request, timeout=_CALL_TIMEOUT_S))
        described = describe_autoscaler(report)
        if as_json:
            out.print_json(json.dumps(described))
        else:
            for one in described["models"]:
                _draw_model(one)


def describe_autoscaler(report: Any) -> dict[str, Any]:
    modes = {_mode_to_wire(mode): mode.value for mode in ModeName}
    return {
        "models": [
            {
                "model": one.model,
                "mode": modes.get(one.mode, "unknown"),
                "idle_s": one.idle_s,
                "pools": [
                    {
                        "role": role,
                        "min_replicas": pool.min_replicas,
                        "max_replicas": pool.max_replicas,
                        "desired": pool.desired,
                        "ready": pool.ready,
                        "pressure": pool.pressure,
                        "signal": pool.signal,
                    }
                    for role, pool in (("prefill", one.prefill), ("decode", one.decode))
                ],
                "decisions": [
                    {
                        "at_s": decision.at_s,
                        "action": decision.action,
                        "text": decision.text,
                        "reason": decision.reason,
                        "performed": decision.performed,
                        "before": [decision.prefill_before, decision.decode_before],
                        "after": [decision.prefill_after, decision.decode_after],
                    }
                    for decision in one.decisions
                ],
            }
            for one in report.models
        ]
    }


def _draw_model(one: dict[str, Any]) -> None:
    out.print(f"{one['model']}  autoscaler {one['mode']}, unused for {one['idle_s']:.0f} s", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("pool", "ready", "wanted", "limits", "pressure"):
        table.add_column(column, justify="left" if column == "pool" else "right", no_wrap=True)
    table.add_column("because")
    for pool in one["pools"]:
        pressure = f"{pool['pressure']:.2f}"
        table.add_row(
            pool["role"],
            str(pool["ready"]),
            str(pool["desired"]),
            f"{pool['min_replicas']} - {pool['max_replicas']}",
            f"[red]{pressure}[/]" if pool["pressure"] > 1 else pressure,
            pool["signal"],
        )
    out.print(table)
    for decision in one["decisions"]:
        at = time.strftime("%H:%M:%S", time.localtime(decision["at_s"]))
        nothing = decision["action"] == "none"
        undone = "" if nothing or decision["performed"] else " (not done)"
        out.print(
            f"  {at}  {decision['text']}{undone}: {decision['reason']}",
            style="dim" if nothing else "default",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _change(cluster: str, call: Any) -> None:
    with errors_as_lines():
        draw(describe(call_manager(cluster, call)))


def _role_to_wire(role: RoleName | None) -> Any:
    from common.codec import role_to_wire
    from common.types import Role
    from common.wire.types_pb2 import ROLE_UNSPECIFIED

    return ROLE_UNSPECIFIED if role is None else role_to_wire(Role(role.value))


def _mode_to_wire(mode: ModeName | None) -> Any:
    from common.wire import registry_pb2

    return {
        None: registry_pb2.AUTOSCALER_MODE_UNSPECIFIED,
        ModeName.OFF: registry_pb2.AUTOSCALER_MODE_OFF,
        ModeName.DRY_RUN: registry_pb2.AUTOSCALER_MODE_DRY_RUN,
        ModeName.ON: registry_pb2.AUTOSCALER_MODE_ON,
    }[mode]
