"""Does KV get from every prefill worker to every decode worker of a running cluster, by which transport, and how fast.

The decode workers are asked to try (`Decode.ProbeLinks`), on memory of their own, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy.diagnosis.finding import Finding, Severity

if TYPE_CHECKING:
    from deploy.cluster_state import ClusterState

_AREA = "cluster"
_PROBE_TIMEOUT_S = 60.0
_MIB = 2**20


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


async def probe_links(state: ClusterState) -> tuple[list[LinkFinding], list[Finding]]:
    """Every link that was tried, and whatever else is wrong with the workers. Raises what the manager says."""
    from common.codec import role_from_wire
    from common.errors import PdserveError
    from common.rpc import connect
    from common.types import Role, WorkerState
    from common.wire.types_pb2 import WorkerRef
    from common.wire.worker_pb2 import ProbeLinksRequest
    from deploy.commands.manager import ask_status, called

    channel = connect(state.manager_address, state.token)
    try:
        snapshot = await called(channel, state, ask_status)
    finally:
        await channel.close(None)
    ready = [worker for worker in snapshot.workers if worker.state == WorkerState.READY]
    links: list[LinkFinding] = []
    recut: list[Finding] = []
    problems = [_not_ready(worker) for worker in snapshot.workers if worker.state != WorkerState.READY]
    for decode in (worker for worker in ready if role_from_wire(worker.role) is Role.DECODE):
        prefill = [one for one in ready if role_from_wire(one.role) is Role.PREFILL and one.model == decode.model]
        refs = [WorkerRef(worker_id=one.worker_id, incarnation=one.incarnation, address=one.address) for one in prefill]
        try:
            reply = await _probe(decode.address, state.token, ProbeLinksRequest(prefill=refs))
        except PdserveError as error:
            problems.append(_no_hand_off(decode.worker_id, f"does not probe: {error.message}"))
            continue
        for peer in reply.peers:
            if peer.HasField("refused"):
                why = f"{peer.refused.message} ({peer.refused.param or peer.refused.code})"
                problems.append(_no_hand_off(f"{peer.prefill_worker_id} -> {decode.worker_id}", f"no hand-off: {why}"))
            links.extend(_link_finding(decode.worker_id, peer, link) for link in peer.links)
        refused = {peer.prefill_worker_id for peer in reply.peers if peer.HasField("refused")}
        recut.extend(found for one in prefill if one.worker_id not in refused for found in recutting(one, decode))
    return links, problems + recut + list(_of_links(links))


async def _probe(address: str, token: str, request: Any) -> Any:
    import grpc.aio

    from common.rpc import connect, error_from_rpc
    from common.wire.worker_pb2_grpc import DecodeStub

    channel = connect(address, token)
    try:
        return await DecodeStub(channel).ProbeLinks(request, timeout=_PROBE_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    finally:
        await channel.close(None)


def _not_ready(worker: Any) -> Finding:
    found = f"{worker.state}: {worker.failure}" if worker.failure else str(worker.state)
    if worker.state == "failed":
        advice = f"pdserve logs {worker.worker_id}; a change of scale gives it a new chance"
        return Finding(_AREA, worker.worker_id, found, Severity.FAILURE, "it was given up", advice)
    return Finding(_AREA, worker.worker_id, found, Severity.WARNING, "it serves nobody now", f"pdserve logs {worker.worker_id}")


def _no_hand_off(whose: str, why: str) -> Finding:
    return Finding(_AREA, whose, why, Severity.FAILURE, "prompts are prefilled where they are decoded")


def recutting(prefill: Any, decode: Any) -> Iterator[Finding]:
    """Of two workers, as they describe themselves, between which hand-offs are not refused."""
    if (prefill.block_tokens, prefill.dtype) == (decode.block_tokens, decode.dtype):
        return
    found = (
        f"KV is cut anew: blocks of {prefill.block_tokens} tokens in {prefill.dtype} become blocks of {decode.block_tokens} in"
        f" {decode.dtype}"
    )
    means = "one more copy on the way; each side caches prefixes under names of its own"
    yield Finding(_AREA, f"{prefill.worker_id} -> {decode.worker_id}", found, Severity.NOTE, means)


def _of_links(links: Sequence[LinkFinding]) -> Iterator[Finding]:
    """A transport that is merely not there is no problem as long as another one is."""
    broken = [link for link in links if link.configured and not link.works]
    for link in broken:
        means = "hand-offs take another transport, or the prompt is computed again"
        yield Finding(
            _AREA, f"{link.prefill} -> {link.decode}", f"{link.transport} is broken", Severity.WARNING, means, link.advice
        )
    if not broken:
        pairs = len({(link.prefill, link.decode) for link in links})
        means = "" if links else "prompts are prefilled where they are decoded"
        yield Finding(
            _AREA, "hand-off", f"works between {pairs} pairs of workers" if links else "no pair of workers", means=means
        )


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
