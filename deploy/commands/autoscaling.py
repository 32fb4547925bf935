"""How the autoscaler's report looks: per model its mode, both pools with their pressure, the last decisions and their reasons."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from deploy.commands.figures import span
from deploy.commands.output import out

if TYPE_CHECKING:
    from common.wire.registry_pb2 import AutoscalerMode, AutoscalerReport

_MODES = {1: "off", 2: "dry-run", 3: "on"}
_LAST_DECISIONS = 10


def mode_to_wire(name: str) -> AutoscalerMode:
    from common.wire.registry_pb2 import AUTOSCALER_MODE_DRY_RUN, AUTOSCALER_MODE_OFF, AUTOSCALER_MODE_ON

    return {"off": AUTOSCALER_MODE_OFF, "dry-run": AUTOSCALER_MODE_DRY_RUN, "on": AUTOSCALER_MODE_ON}[name]


def describe_report(report: AutoscalerReport) -> dict[str, Any]:
    """What `autoscaler --json` prints."""
    return {
        "models": [
            {
                "model": one.model,
                "mode": _MODES.get(one.mode, "unknown"),
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


def draw_report(described: dict[str, Any]) -> None:
    for model in described["models"]:
        heading = Text(model["model"], style="bold")
        heading.append(f"  autoscaler {model['mode']}", style="default")
        heading.append(f"  unused for {span(model['idle_s'])}", style="dim")
        out.print(heading)
        out.print(_pools(model["pools"]))
        for decision in model["decisions"][-_LAST_DECISIONS:]:
            out.print(_decision(decision), soft_wrap=True)


def _pools(pools: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("pool", "ready", "wanted", "limits", "pressure"):
        table.add_column(column, justify="left" if column == "pool" else "right", no_wrap=True)
    table.add_column("because")
    for pool in pools:
        pressure = Text(f"{pool['pressure']:.2f}", style="red" if pool["pressure"] > 1 else "default")
        limits = f"{pool['min_replicas']}..{pool['max_replicas']}"
        table.add_row(pool["role"], str(pool["ready"]), str(pool["desired"]), limits, pressure, Text(pool["signal"]))
    return table


def _decision(decision: dict[str, Any]) -> Text:
    nothing = decision["action"] == "none"
    at = datetime.fromtimestamp(decision["at_s"]).astimezone().strftime("%H:%M:%S")
    line = Text(f"  {at}  ", style="dim")
    line.append(decision["text"], style="dim" if nothing else "default")
    if not nothing and not decision["performed"]:
        line.append(" (not done)", style="yellow")
    line.append(f": {decision['reason']}", style="dim")
    return line
