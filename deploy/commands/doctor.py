"""`pdserve doctor`: is this machine fit, does KV get from every prefill worker to every decode worker, and what to fix if not.

Asks the running cluster's decode workers to try their links (`Decode.ProbeLinks`), one by one. Exit status 1 if something
stands in the way of serving; a transport that is merely not there is no failure as long as another one is.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import resource
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deploy.commands.control import ClusterName
from deploy.commands.output import errors_as_lines, out

_PROBE_TIMEOUT_S = 60.0
_FEWEST_FILES = 4096
_MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """One line about this machine. `advice` says what to do, or is empty."""

    what: str
    found: str
    ok: bool
    advice: str = ""


@dataclass(frozen=True)
class LinkFinding:
    """One transport between one prefill and one decode worker."""

    prefill: str
    decode: str
    transport: str
    works: bool
    in_use: bool
    configured: bool
    latency_ms: float
    mebibytes_per_s: float
    advice: str


def doctor(
    cluster: ClusterName = "local",
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Checks this machine and tries every link between prefill and decode workers."""
    from common.config import pdserve_home
    from common.errors import ClusterError
    from deploy.cluster_state import running_state

    with errors_as_lines():
        machine = list(check_machine())
        links: list[LinkFinding] = []
        refusals: list[str] = []
        try:
            running_state(pdserve_home(), cluster)
            running = True
        except ClusterError:
            running = False
        if running:
            links, refusals = asyncio.run(_probe(cluster))
        if as_json:
            described = {
                "machine": [asdict(finding) for finding in machine],
                "cluster": cluster if running else None,
                "links": [asdict(link) for link in links],
                "refused": refusals,
            }
            out.print_json(json.dumps(described))
        else:
            _draw(machine, links, refusals, cluster, running)
        if refusals or not all(finding.ok for finding in machine):
            raise typer.Exit(1)


def check_machine() -> Iterable[Finding]:
    """What pdserve needs of a machine; cheap, imports nothing heavy."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(
        "python", version, sys.version_info >= (3, 11), "" if sys.version_info >= (3, 11) else "use Python 3.11 or later"
    )
    for module, extra, needed in (("torch", "engine", True), ("ray", "ray", True), ("nixl", "nixl", False)):
        there = importlib.util.find_spec(module) is not None or (
            module == "nixl" and importlib.util.find_spec("nixl_cu13") is not None
        )
        advice = "" if there else f"pip install 'pdserve[{extra}]'" + ("" if needed else ", for RDMA and NVLink")
        yield Finding(module, "installed" if there else "not installed", there or not needed, advice)
    cores = len(os.sched_getaffinity(0))
    yield Finding("cores", str(cores), True, "" if cores >= 2 else "prefill and decode will share one core")
    free_bytes = _available_memory_bytes()
    yield Finding(
        "memory",
        f"{free_bytes / 2**30:.1f} GiB available",
        free_bytes >= 2**30,
        "" if free_bytes >= 2**30 else "a worker needs weights and KV pool in memory: lower engine.kv_pool_tokens",
    )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding(
        "open files", str(files), files >= 256, "" if files >= _FEWEST_FILES else f"ulimit -n {_FEWEST_FILES} before `pdserve up`"
    )
    shared = _can_share_memory()
    yield Finding("shared memory", "works" if shared else "refused", True, "" if shared else "transport shm cannot be used here")


def _available_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _can_share_memory() -> bool:
    try:
        os.close(os.memfd_create("pdserve-doctor", os.MFD_CLOEXEC))
    except OSError:
        return False
    return True


async def _probe(cluster: str) -> tuple[list[LinkFinding], list[str]]:
    import grpc.aio

    from common.codec import role_from_wire
    from common.config import pdserve_home
    from common.errors import PdserveError
    from common.rpc import connect, error_from_rpc
    from common.types import Role, WorkerState
    from common.wire.registry_pb2 import StatusRequest
    from common.wire.registry_pb2_grpc import ControlStub
    from common.wire.types_pb2 import WorkerRef
    from common.wire.worker_pb2 import ProbeLinksRequest
    from common.wire.worker_pb2_grpc import DecodeStub
    from deploy.cluster_state import running_state

    state = running_state(pdserve_home(), cluster)

    async def call(address: str, ask: Any) -> Any:
        channel = connect(address, state.token)
        try:
            return await ask(channel)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            await channel.close(None)

    snapshot = await call(
        state.manager_address, lambda channel: ControlStub(channel).Status(StatusRequest(refresh=True), timeout=_PROBE_TIMEOUT_S)
    )
    ready = [worker for worker in snapshot.workers if worker.state == WorkerState.READY]
    links: list[LinkFinding] = []
    refusals = [f"{worker.worker_id} is {worker.state}" for worker in snapshot.workers if worker.state != WorkerState.READY]
    for decode in (worker for worker in ready if role_from_wire(worker.role) is Role.DECODE):
        prefill = [one for one in ready if role_from_wire(one.role) is Role.PREFILL and one.model == decode.model]
        refs = [WorkerRef(worker_id=one.worker_id, incarnation=one.incarnation, address=one.address) for one in prefill]
        request = ProbeLinksRequest(prefill=refs)
        try:
            reply = await call(
                decode.address, lambda channel, request=request: DecodeStub(channel).ProbeLinks(request, timeout=_PROBE_TIMEOUT_S)
            )
        except PdserveError as error:
            refusals.append(f"{decode.worker_id} does not probe: {error.message}")
            continue
        for peer in reply.peers:
            if peer.HasField("refused"):
                pair = f"{peer.prefill_worker_id} -> {decode.worker_id}"
                refusals.append(f"{pair}: no hand-off: {peer.refused.message} ({peer.refused.param or peer.refused.code})")
            links.extend(_link_finding(decode.worker_id, peer, link) for link in peer.links)
    return links, refusals


def _link_finding(decode: str, peer: Any, link: Any) -> LinkFinding:
    works = not link.HasField("error")
    return LinkFinding(
        prefill=peer.prefill_worker_id,
        decode=decode,
        transport=link.kind,
        works=works,
        in_use=link.kind == peer.transport,
        configured=link.configured,
        latency_ms=link.latency_s * 1e3,
        mebibytes_per_s=link.bytes_per_s / _MIB,
        advice="" if works else advise(link.kind, link.error.code, link.error.param, link.error.message),
    )


def advise(kind: str, code: str, param: str, message: str) -> str:
    """What to do about a link that does not work."""
    match kind, code, param:
        case _, _, "cluster_token":
            return "the two workers belong to different clusters: start both with the same token"
        case "nixl", _, "transports":
            return f"{message}; needed only for RDMA and NVLink"
        case "shm", "TransferBroken", _:
            return "works between processes of one host only; elsewhere use tcp"
        case "tcp", "TransferBroken" | "TransferTimeout", _:
            return f"{message}: is there a firewall between the workers?"
        case _:
            return f"{message} ({param or code})"


def _draw(machine: list[Finding], links: list[LinkFinding], refusals: list[str], cluster: str, running: bool) -> None:
    for finding in machine:
        mark = "[green]ok  [/]" if finding.ok and not finding.advice else "[yellow]note[/]" if finding.ok else "[red]bad [/]"
        out.print(f"{mark} {finding.what}: {finding.found}" + (f"  -> {finding.advice}" if finding.advice else ""))
    if not running:
        out.print(f"note no cluster {cluster!r} runs here: links were not tried (start one with `pdserve up CONFIG`)")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("prefill", "decode", "transport", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("latency ms", "MiB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what to do")
    for link in links:
        state = (
            "[green]in use[/]"
            if link.in_use
            else "works"
            if link.works
            else "[red]broken[/]"
            if link.configured
            else "[dim]off[/]"
        )
        figures = (f"{link.latency_ms:.1f}", f"{link.mebibytes_per_s:,.0f}") if link.works else ("", "")
        table.add_row(link.prefill, link.decode, link.transport, state, *figures, link.advice)
    out.print(table)
    for refusal in refusals:
        out.print(f"bad  {refusal}", style="red", markup=False, soft_wrap=True)
    if not links and not refusals:
        out.print("note no pair of prefill and decode workers: prompts are prefilled where they are decoded")
