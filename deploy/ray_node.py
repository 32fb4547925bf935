"""`python -m deploy.ray_node head | worker`: starts Ray on this host, as deploy/ray/*.yaml ask for it.

What `ray start` does not do by itself: it asks for a token, it names this host by its private address, and on a host whose
provider knows no node types (`local`) it says how many workers of each role the host takes. Ray's own ports listen on all
interfaces of the host and want the token; that nobody outside reaches them is the network's matter.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.types import Role
from deploy.janitor import kill_all, members
from deploy.node_guard import MARK_VARIABLE
from deploy.ray_environment import node_variables

GCS_PORT = 6379
_ELSEWHERE = "192.0.2.1"  # of a network that exists in documents only
_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # nothing of ours lives there
_GUARDS = 2  # one may be killed
_MOST_STARTS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.ray_node", description="Starts Ray on this host.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    head = kinds.add_parser("head", help="the host with GCS, pool manager and router")
    head.add_argument("--autoscaler", choices=["v1", "v2"], default="v2", help="v1 for the provider `local`")
    worker = kinds.add_parser("worker", help="a host for workers")
    worker.add_argument("--head", required=True, metavar="ADDRESS", help="of the head")
    for each in (head, worker):
        each.add_argument("--address", help="of this host; else the one from which it reaches the head, or other networks")
        each.add_argument(
            "--slots",
            action="append",
            default=[],
            type=slots_from,
            metavar="ADDRESS=prefill:N,decode:N",
            help="what the host with this address takes; as often as there are hosts",
        )
    given = parser.parse_args(arguments)
    address = given.address or own_address(getattr(given, "head", None))
    command = ray_start(given.kind, address, dict(given.slots), head=getattr(given, "head", None))
    mark = uuid.uuid4().hex
    variables = node_variables(autoscaler_v2=given.kind == "worker" or given.autoscaler == "v2")
    _start(command, {**os.environ, **variables, MARK_VARIABLE: mark}, mark)
    for _ in range(_GUARDS):
        _guard(mark)


def _start(command: Sequence[str], environment: Mapping[str, str], mark: str) -> None:
    """NOTE: Ray's launcher never tries a host again whose start failed once, as on one that is very busy when it comes back."""
    for _ in range(_MOST_STARTS):
        started = subprocess.run(command, env=environment, check=False)
        if started.returncode == 0:
            return
        kill_all(mark, variable=MARK_VARIABLE)
    raise SystemExit(started.returncode)


def _guard(mark: str) -> None:
    """Starts what ends with the raylet what the raylet leaves."""
    raylets = [pid for pid in members(mark, MARK_VARIABLE) if _name_of(pid) == "raylet"]
    if len(raylets) != 1:
        raise SystemExit("ray_node: Ray started, but there is no raylet")
    subprocess.Popen(
        [sys.executable, "-m", "deploy.node_guard", "--mark", mark, "--raylet", str(raylets[0])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def ray_start(kind: str, address: str, slots: Mapping[str, Mapping[Role, int]], *, head: str | None) -> list[str]:
    """The command, Ray by its full name: a login shell has a PATH of its own."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", f"--node-ip-address={address}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    command.append("--disable-usage-stats")
    if address in slots:
        command.append("--resources=" + json.dumps({role.value: count for role, count in slots[address].items()}))
    if kind == "head":
        config = str(Path("~/ray_bootstrap_config.yaml").expanduser())  # where `ray up` leaves it
        return [*command, "--head", f"--port={GCS_PORT}", "--include-dashboard=false", f"--autoscaling-config={config}"]
    return [*command, f"--address={head}:{GCS_PORT}"]


def own_address(peer: str | None) -> str:
    """The address from which this host reaches `peer`, or without one, any other network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer or _ELSEWHERE, GCS_PORT))  # sends nothing
        except OSError as error:
            raise SystemExit(f"ray_node: no way leads to {peer or 'other networks'}; give --address") from error
        return str(probe.getsockname()[0])


def slots_from(text: str) -> tuple[str, dict[Role, int]]:
    """`10.0.0.11=prefill:2,decode:1`."""
    address, separator, listed = text.partition("=")
    slots = {}
    for item in listed.split(","):
        name, _, count = item.partition(":")
        if not separator or name not in set(Role) or not count.isdecimal():
            raise argparse.ArgumentTypeError(f"expected ADDRESS=prefill:N,decode:N, got {text!r}")
        slots[Role(name)] = int(count)
    return address, slots


if __name__ == "__main__":
    main()
