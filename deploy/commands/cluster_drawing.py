"""How a cluster looks to `status` and to the commands that change it: itself, each model and router, and its workers."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from deploy.commands.figures import UNKNOWN, degree, share, span
from deploy.commands.output import out

STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "failed": "bold red"}
_WIDE, _WIDER = 100, 140  # columns of the terminal from which on there is room for more


def draw_status(described: dict[str, Any]) -> None:
    heading = Text(f"cluster {described['cluster']}", style="bold")
    heading.append(f"  pdserve {described['pdserve']}, up {span(described['up_s'])}", style="default")
    heading.append(f"  manager {described['manager_address']}", style="dim")
    out.print(heading, soft_wrap=True)
    _draw_models(described)
    for router in described["routers"]:
        line = Text("router   ", style="dim")
        line.append(f"http://{router['http_address']}", style="default")
        line.append(f"  gRPC {router['grpc_address']}  pid {router['pid']}  up {span(router['up_s'])}", style="default")
        out.print(line, soft_wrap=True)
    if not described["routers"]:
        out.print(Text("no router is connected", style="yellow"))
    out.print(_workers(described["workers"]))
    for worker in described["workers"]:
        if worker["failure"]:
            failed = worker["state"] == "failed"
            told = f"{worker['worker_id']}: {'given up' if failed else 'restarted'}: {worker['failure']}"
            out.print(told, style="red" if failed else "dim", markup=False, soft_wrap=True)


def _draw_models(described: dict[str, Any]) -> None:
    modes = described.get("autoscaler", {})
    for model in described["models"]:
        line = Text("model    ", style="dim")
        line.append(model["name"], style="default")
        for role in ("prefill", "decode"):
            ready = sum(
                worker["role"] == role and worker["model"] == model["name"] and worker["state"] == "ready"
                for worker in described["workers"]
            )
            wanted = model[f"desired_{role}"]
            line.append(f"  {role} ", style="default")
            line.append(f"{ready}/{wanted}", style="green" if ready == wanted else "yellow")
        if model["context_tokens"]:
            line.append(f"  context {model['context_tokens']:,} tokens", style="default")
        if modes.get(model["name"]):
            line.append(f"  autoscaler {modes[model['name']]}", style="default")
        if model["wakes_on_demand"]:
            line.append("  asleep until somebody asks", style="dim")
        elif model["awaits_successor"]:
            line.append("  requests wait for a lost worker's successor", style="dim")
        out.print(line, soft_wrap=True)


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    groups = any(_degree(worker) for worker in workers)
    for column in ("worker", "ranks", "state") if groups else ("worker", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("up", "run", "wait", "served", "KV used"):
        table.add_column(column, justify="right", no_wrap=True)
    wide, wider = out.width >= _WIDE, out.width >= _WIDER
    if wide:
        for column in ("start", "leases", "pid"):
            table.add_column(column, justify="right", no_wrap=True)
    if wider:
        for column in ("computes", "address"):
            table.add_column(column, no_wrap=True)
    for worker in workers:
        total, free = worker["blocks_total"], worker["blocks_free"]
        used = f"{share((total - free) / total)} of {total:,}" if total else UNKNOWN
        row: list[Text | str] = [
            Text(worker["worker_id"]),
            *([_degree(worker) or "1"] if groups else []),
            Text(worker["state"], style=STYLES.get(worker["state"], "default")),
            span(worker["up_s"]),
            str(worker["requests_running"]),
            str(worker["requests_waiting"]),
            str(worker["requests_served"]),
            used,
        ]
        if wide:
            row += [str(worker["incarnation"]), str(worker["leases_open"]), _pids(worker)]
        if wider:
            computes = " ".join(part for part in (worker["device"], worker["dtype"], "exact" if worker["exact"] else "") if part)
            row += [computes or UNKNOWN, worker["address"] or UNKNOWN]
        table.add_row(*row)
    return table


def _degree(worker: dict[str, Any]) -> str:
    return degree(worker["tensor_parallel"], worker["pipeline_parallel"])


def _pids(worker: dict[str, Any]) -> str:
    """Of all its processes, rank 0 first."""
    return ", ".join(str(pid) for pid in (worker["pid"], *worker["rank_pids"]) if pid) or UNKNOWN
