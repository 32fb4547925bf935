"""`pdserve status`: what belongs to a running cluster, and how it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out
from deploy.commands.which_cluster import ClusterName

EXAMPLES = examples(
    ("routers and workers, and what went wrong with them", "pdserve status"),
    ("pids of all workers, for a program", "pdserve status --json | jq '.workers[].pid'"),
    ("the same and more, as it changes", "pdserve top"),
)


def status(
    cluster: ClusterName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Shows models, routers and workers: state, age, load, KV, and why a worker was given up."""
    from deploy.commands.cluster_drawing import draw_status
    from deploy.commands.manager import CALL_TIMEOUT_S, ask_status, call_manager, describe
    from deploy.commands.which_cluster import chosen_state

    with errors_as_lines():
        state = chosen_state(cluster)
        described = describe(call_manager(state, ask_status), state)
        described["autoscaler"] = _autoscaler_modes(state, CALL_TIMEOUT_S)
        if as_json:
            out.print_json(described)
        else:
            draw_status(described)


def _autoscaler_modes(state: Any, timeout_s: float) -> dict[str, str]:
    """By model; empty where the cluster has no autoscaler."""
    from common.errors import ClusterError
    from common.wire.registry_pb2 import AutoscalerRequest
    from deploy.commands.autoscaling import describe_report
    from deploy.commands.manager import call_manager

    try:
        report = call_manager(state, lambda stub: stub.Autoscaler(AutoscalerRequest(), timeout=timeout_s))
    except ClusterError:
        return {}
    return {model["model"]: model["mode"] for model in describe_report(report)["models"]}
