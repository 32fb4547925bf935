"""`pdserve scale | drain | flip | roll | autoscaler`: change the workers of a running cluster, or see who does."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out
from deploy.commands.which_cluster import ClusterName, chosen_state

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_CALL_TIMEOUT_S = 15.0
_WAIT_S = 120.0

SCALE_EXAMPLES = examples(
    ("two prefill workers and one decode worker, while it serves", "pdserve scale tiny --prefill 2 --decode 1"),
    ("say it, and do not wait", "pdserve scale tiny --decode 4 --wait 0"),
)
DRAIN_EXAMPLES = examples(("take a worker out, without losing a request; another takes its place", "pdserve drain tiny/decode/0"))
FLIP_EXAMPLES = examples(("make a decode worker of a prefill worker", "pdserve flip tiny/prefill/1 decode"))
ROLL_EXAMPLES = examples(
    ("replace all workers of a model, one by one", "pdserve roll tiny"),
    ("only its decode workers", "pdserve roll tiny --role decode"),
)
AUTOSCALER_EXAMPLES = examples(
    ("what it sees, and why it decided as it did", "pdserve autoscaler"),
    ("let it decide, but change nothing", "pdserve autoscaler tiny --mode dry-run"),
)

Model = Annotated[str, typer.Argument(help="Name of the model.", show_default=False)]
WorkerId = Annotated[str, typer.Argument(metavar="WORKER", help="Such as tiny/decode/0.", show_default=False)]
Wait = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long to wait until it is so; 0 returns at once.")]


class RoleName(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Mode(StrEnum):
    OFF = "off"
    DRY_RUN = "dry-run"
    ON = "on"


def scale(
    model: Model,
    prefill: Annotated[int | None, typer.Option(min=0, show_default=False, help="Prefill workers wanted.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, show_default=False, help="Decode workers wanted.")] = None,
    wait: Wait = _WAIT_S,
    cluster: ClusterName = None,
) -> None:
    """Changes how many workers a model has, while it serves."""
    from common.wire.registry_pb2 import ScaleRequest

    with errors_as_lines():
        if prefill is None and decode is None:
            raise typer.BadParameter("give --prefill, --decode or both")
        request = ScaleRequest(model=model, prefill=prefill, decode=decode, wait_s=wait)
        _change(cluster, lambda stub: stub.Scale(request, timeout=wait + _CALL_TIMEOUT_S))


def drain(worker: WorkerId, wait: Wait = _WAIT_S, cluster: ClusterName = None) -> None:
    """Takes a worker out of service without losing a request; its pool puts another in its place."""
    from common.wire.registry_pb2 import DrainWorkerRequest

    with errors_as_lines():
        request = DrainWorkerRequest(worker_id=worker, wait_s=wait)
        _change(cluster, lambda stub: stub.Drain(request, timeout=wait + _CALL_TIMEOUT_S))


def flip(
    worker: WorkerId,
    role: Annotated[RoleName, typer.Argument(help="What it is to be.", show_default=False)],
    wait: Wait = _WAIT_S,
    cluster: ClusterName = None,
) -> None:
    """Makes a prefill worker of a decode worker, or the other way round; it keeps its process and its weights."""
    from common.codec import role_to_wire
    from common.types import Role
    from common.wire.registry_pb2 import FlipRequest

    with errors_as_lines():
        request = FlipRequest(worker_id=worker, role=role_to_wire(Role(role.value)), wait_s=wait)
        _change(cluster, lambda stub: stub.Flip(request, timeout=wait + _CALL_TIMEOUT_S))


def roll(
    model: Model,
    role: Annotated[RoleName | None, typer.Option(help="Only these; default: both.", show_default=False)] = None,
    wait: Wait = 5 * _WAIT_S,
    cluster: ClusterName = None,
) -> None:
    """Replaces a model's workers one by one, each by a new process, without losing a request."""
    from common.codec import role_to_wire
    from common.types import Role
    from common.wire.registry_pb2 import RollRequest

    with errors_as_lines():
        request = RollRequest(model=model, wait_s=wait)
        if role is not None:
            request.role = role_to_wire(Role(role.value))
        _change(cluster, lambda stub: stub.Roll(request, timeout=wait + _CALL_TIMEOUT_S))


def autoscaler(
    model: Annotated[str, typer.Argument(help="Name of the model; default: all.", show_default=False)] = "",
    mode: Annotated[Mode | None, typer.Option(help="How it is to work from now on.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    cluster: ClusterName = None,
) -> None:
    """Shows what the autoscaler sees and why it decided as it did; turns it on and off."""
    from common.wire.registry_pb2 import AutoscalerRequest
    from deploy.commands.autoscaling import describe_report, draw_report, mode_to_wire
    from deploy.commands.manager import call_manager

    with errors_as_lines():
        request = AutoscalerRequest(model=model)
        if mode is not None:
            request.mode = mode_to_wire(mode.value)
        state = chosen_state(cluster)
        report = describe_report(call_manager(state, lambda stub: stub.Autoscaler(request, timeout=_CALL_TIMEOUT_S)))
        if as_json:
            out.print_json(report)
        else:
            draw_report(report)


def _change(cluster: str | None, call: Callable[[Any], Awaitable[Any]]) -> None:
    from deploy.commands.cluster_drawing import draw_status
    from deploy.commands.manager import call_manager, describe

    state = chosen_state(cluster)
    draw_status(describe(call_manager(state, call), state))
