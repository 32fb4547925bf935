"""The cells of the chaos matrix: one fault, one place, one link, one policy. Each runs real requests and says how they ended.

A cell is a question with an answer that is known before: which endings are right. What else happened (other tokens, no end, an
error without a type, blocks that were not given back, a transfer that was used although it had been tampered with, a later
request that fails) is a problem, in words. A cell with a problem has failed.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc.aio

from common.errors import ERRORS_BY_CODE, HandoffError
from common.types import Request
from common.wire import worker_pb2, worker_pb2_grpc
from support.chaos import fault_transport
from support.chaos.fault_transport import TransportFault
from support.chaos.processes import WorkerProcess
from support.chaos.rig import Ending, Outcome, Rig, until
from support.chaos.rpc_fault_proxy import RpcFault, RpcFaultProxy
from support.chaos.steps import DecodeStep, PrefillStep, Step
from support.chaos.tcp_fault_proxy import LinkFault

HALT_TIMEOUT_S = 4.0
SLACK_S = 2.0
BESIDE_TOKENS = 120
CONCURRENCY = 12

EXACT = Ending.EXACT.value
HANDOFF_ERRORS = frozenset(code for code, kind in ERRORS_BY_CODE.items() if issubclass(kind, HandoffError)) - {"HandoffError"}
LOST_OR_LATE = frozenset({"WorkerLost", "DeadlineExceeded"})


class Policy(enum.StrEnum):
    """What the decode worker may do when the prefill worker fails it."""

    NEVER = "never"  # it never prefills: the client hears a typed error
    AUTO = "auto"  # it prefills itself: the client hears the tokens


class Signal(enum.Enum):
    KILL = "SIGKILL"
    STOP_CONT = "SIGSTOP, SIGCONT"
    STOP_KILL = "SIGSTOP, SIGKILL"


HANDSHAKE_STEPS: frozenset[Step] = frozenset({DecodeStep.HANDSHAKE_SENT, PrefillStep.HANDSHAKE_RECEIVED, PrefillStep.LINKED})
WRITER_OPEN_STEPS: frozenset[Step] = frozenset(
    {
        PrefillStep.GRANTED,
        PrefillStep.BEFORE_FIRST_WRITE,
        PrefillStep.MID_WRITE,
        PrefillStep.MID_PIECE,
        PrefillStep.AFTER_FIRST_WRITE,
        PrefillStep.BEFORE_CLOSE,
    }
)
"""Here the prefill worker has the right to write, and would still do so when it goes on."""


@dataclass
class CellResult:
    section: str
    row: str
    column: str
    policy: Policy
    outcomes: list[Outcome] = field(default_factory=list)  # of the requests that the fault was meant for
    problems: list[str] = field(default_factory=list)
    faulted: int = 0  # requests in whose path a fault fell, or beside which a worker died
    corruptions: int = 0
    undetected: int = 0
    false_alarms: int = 0
    seconds: float = 0.0
    reached: bool = True

    @property
    def endings(self) -> Counter[str]:
        return Counter(outcome.label for outcome in self.outcomes)

    def judge(self, outcomes: Sequence[Outcome], allowed: frozenset[str], what: str) -> None:
        for outcome in outcomes:
            if outcome.label not in allowed:
                self.problems.append(
                    f"{what} {outcome.request_id}: {outcome.ending.value} {outcome.error} {outcome.detail}".strip()
                )


def prompt_of(number: int, length: int = 84) -> list[int]:
    """Few prompts, so that the oracle is not asked for ever; each with blocks unlike any other's."""
    chance = random.Random(number)
    return [chance.randrange(3, 380) for _ in range(length)]


# -- SIGKILL and SIGSTOP at a step -------------------------------------------------------------------------------------


async def process_cell(rig: Rig, policy: Policy, step: Step, signal_: Signal, number: int) -> CellResult:
    """One request is brought to the step and its process killed or stopped there; another runs beside it, two come after."""
    on_decode = isinstance(step, DecodeStep)
    who = "decode" if on_decode else "prefill"
    cell = CellResult(who, step.value, f"{rig.transport}: {signal_.value}", policy, faulted=2)
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    started = asyncio.Event()
    beside_request = rig.request(prompt_of(number + 100, 40), max_tokens=BESIDE_TOKENS)
    beside = asyncio.ensure_future(rig.ask(beside_request, started=started))
    await asyncio.wait({beside, asyncio.ensure_future(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if step in HANDSHAKE_STEPS:
        await rig.respawn(rig.prefill[0])
    victim: WorkerProcess = rig.decode if on_decode else rig.prefill[0]
    survivor = rig.prefill[0] if on_decode else rig.decode
    request = rig.request(prompt_of(number), seed=number % 2)
    await victim.arm(step, request.request_id)
    faulted = asyncio.ensure_future(rig.ask(request))
    cell.reached = await victim.wait_halted(HALT_TIMEOUT_S)
    if not cell.reached:
        cell.problems.append("the step was not reached")
        await victim.tell(do="disarm")
    elif signal_ is Signal.KILL:
        await victim.kill()
    else:
        victim.stop()
        victim.go_on()
        await _while_stopped(cell, rig, step, faulted)
        if signal_ is Signal.STOP_CONT:
            victim.resume()
        else:
            await victim.kill()
    cell.outcomes = [await faulted]
    await beside
    allowed = frozenset({EXACT})
    if on_decode and not victim.alive:
        allowed |= {"WorkerLost"}
    elif policy is Policy.NEVER:
        allowed |= HANDOFF_ERRORS | LOST_OR_LATE
    cell.judge(cell.outcomes, allowed, "the request")
    cell.judge([beside.result()], frozenset({EXACT, *(["WorkerLost"] if on_decode and not victim.alive else [])}), "beside,")
    cell.problems += await rig.leaks(survivor)
    if not victim.alive:
        await rig.respawn(victim)
    await _later_requests(cell, rig, request)
    cell.problems += await rig.leaks()
    cell.seconds = clock() - begun_s
    return cell


async def _while_stopped(cell: CellResult, rig: Rig, step: Step, faulted: asyncio.Future[Outcome]) -> None:
    times = rig.times
    if isinstance(step, DecodeStep):
        # The prefill worker must not hold blocks for a decode worker that is silent.
        bound_s = times.lease_s + SLACK_S

        async def nothing_pinned() -> bool:
            info = await rig.info(rig.prefill[0])
            return info.leases_open == 0 and info.blocks_free == info.blocks_total

        await asyncio.sleep(1.3 * times.lease_s)  # whoever goes on after this finds that its peer has given up
        if not await until(nothing_pinned, bound_s):
            cell.problems.append(f"the prefill worker holds blocks {bound_s:g} s after the decode worker stopped")
        return
    bound_s = max(times.lease_s, times.ticket_ttl_s, times.handshake_timeout_s) + SLACK_S
    if step in WRITER_OPEN_STEPS:
        bound_s = times.lease_s + SLACK_S
    await asyncio.wait({faulted}, timeout=bound_s)
    if not faulted.done():
        cell.problems.append(f"the request goes on {bound_s:g} s after the prefill worker stopped")
        return
    if rig.fences:
        cell.problems += [f"while stopped, {left}" for left in await rig.leaks(rig.decode, timeout_s=SLACK_S + 2 * times.lease_s)]
    elif step in WRITER_OPEN_STEPS and not (await rig.info(rig.decode)).blocks_in_transfer:
        cell.problems.append("blocks were freed while a stopped process had the right to write into them")


async def _later_requests(cell: CellResult, rig: Rig, request: Request) -> None:
    """The same prompt in the same cache partition, then another: right, and prefilled where they should be."""
    again = rig.request(request.prompt_token_ids, seed=request.sampling.seed, salt=request.cache_salt)
    other = rig.request(prompt_of(7, 60))
    outcomes = [await rig.ask(again), await rig.ask(other)]
    cell.judge(outcomes, frozenset({EXACT}), "after it,")
    if outcomes[-1].ending is Ending.EXACT and not outcomes[-1].prefill_worker:
        cell.problems.append("after it, no prompt is prefilled remotely any more")


# -- many requests under a fault that does not end a process -----------------------------------------------------------


async def _many(rig: Rig, requests: Sequence[Request], concurrency: int = CONCURRENCY) -> list[Outcome]:
    gate = asyncio.Semaphore(concurrency)

    async def one(request: Request) -> Outcome:
        async with gate:
            return await rig.ask(request)

    return list(await asyncio.gather(*map(one, requests)))


def _requests(rig: Rig, count: int, seed: int, *, timeout_s: float = 10.0) -> list[Request]:
    """A mix of lengths, greedy and sampled; a few share prompt and cache partition."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        number = chance.randrange(40)
        made.append(
            rig.request(
                prompt_of(number, 20 + 3 * number),
                max_tokens=4,
                timeout_s=timeout_s,
                seed=number % 2,
                salt=f"shared{seed}" if chance.random() < 0.1 else None,
            )
        )
    return made


async def _account(
    cell: CellResult, rig: Rig, hits: dict[str, str], corrupted: set[str], outcomes: Sequence[Outcome], *, collateral: bool
) -> None:
    """Which requests were hit, whether a corrupted transfer was used, whether one that was not hit was called corrupt."""
    transfers, planted = await rig.transfers()
    hits = {**hits, **planted}
    corrupted = corrupted | {nonce for nonce, fault in planted.items() if TransportFault(fault) in fault_transport.CORRUPTING}
    hit_requests = {transfer["request_id"] for transfer in transfers if transfer["nonce"] in hits}
    cell.faulted += sum(outcome.request_id in hit_requests for outcome in outcomes)
    used = {transfer["nonce"] for transfer in transfers if transfer["used"]}
    cell.corruptions += len(corrupted)
    cell.undetected += len(corrupted & used)
    if corrupted & used:
        cell.problems.append(f"{len(corrupted & used)} transfers were used although their content had been touched")
    for transfer in transfers:
        if transfer["nonce"] not in hits and transfer["error"] in ("DigestMismatch", "SealMismatch") and not collateral:
            cell.false_alarms += 1
            cell.problems.append(f"false alarm: {transfer['error']} on {transfer['request_id']}, which was not touched")


BREAKING = frozenset(
    {
        LinkFault.BYTES_DROPPED,
        LinkFault.TRUNCATED,
        LinkFault.TABLE_FLIPPED,
        LinkFault.HEADER_FLIPPED,
        LinkFault.BLACK_HOLE,
        LinkFault.BLACK_HOLE_FORWARD,
        LinkFault.BLACK_HOLE_BACK,
        LinkFault.RESET,
        LinkFault.HALF_CLOSED,
        LinkFault.HALF_CLOSED_BACK,
        LinkFault.REPLY_FLIPPED,
        LinkFault.HELLO_FLIPPED,
    }
)
"""They end the connection, or should: every transfer on it is concerned."""


_MOST_ROUNDS = 6


async def link_cell(rig: Rig, policy: Policy, fault: LinkFault, count: int, seed: int, *, least_hits: int = 0) -> CellResult:
    """Many requests over one tcp link on which something goes wrong again and again, then two over the link as it was left.

    How many frames a transfer has depends on which prompts shared a step, so one seed does not fix how many are hit: `count` more
    requests follow until `least_hits` transfers were.
    """
    cell = CellResult("link", fault.value, "tcp", policy)
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    await rig.transfers()
    rig.data.take_hits()
    rig.data.load(fault, share=0.15 if fault in BREAKING else 0.85, seed=seed)
    if fault is LinkFault.HELLO_FLIPPED:
        # Authentication happens once per link: every request finds that its link has just gone.
        for request in _requests(rig, count // 3, seed):
            rig.data.break_all()
            cell.outcomes.append(await rig.ask(request))
    else:
        cell.outcomes = await _many(rig, _requests(rig, count, seed))
        for again in range(1, _MOST_ROUNDS):
            if len(rig.data.hits) >= least_hits:
                break
            cell.outcomes += await _many(rig, _requests(rig, count, seed + 1_000_000 * again))
    rig.data.load(None)
    allowed = frozenset({EXACT}) if policy is Policy.AUTO else HANDOFF_ERRORS | LOST_OR_LATE | {EXACT}
    cell.judge(cell.outcomes, allowed, "request")
    cell.problems += await rig.leaks()
    hits, corrupted = rig.data.take_hits()
    await _account(
        cell,
        rig,
        {nonce.hex(): hit.value for nonce, hit in hits.items()},
        {nonce.hex() for nonce in corrupted},
        cell.outcomes,
        collateral=fault in BREAKING,
    )
    if fault is LinkFault.HELLO_FLIPPED:
        cell.faulted += rig.data.frames.pop("authentication", 0)
    await _recovers(cell, rig)
    cell.seconds = clock() - begun_s
    return cell


async def _recovers(cell: CellResult, rig: Rig) -> None:
    """The link as the fault left it serves again: at once, or after what it takes to find out that it is dead."""

    async def remote_again() -> bool:
        outcome = await rig.ask(rig.request(prompt_of(7, 60)))
        return outcome.ending is Ending.EXACT and bool(outcome.prefill_worker)

    if not await until(remote_again, 2 * (rig.times.lease_s + SLACK_S)):
        cell.problems.append("afterwards no prompt is prefilled remotely any more")
        rig.data.break_all()
    cell.problems += await rig.leaks()


async def transport_cell(rig: Rig, policy: Policy, fault: TransportFault, count: int, seed: int) -> CellResult:
    """Many requests over a decorated transport that does wrong to most of them."""
    cell = CellResult("transport", fault.value, rig.transport, policy)
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    await rig.transfers()
    late = fault is TransportFault.WRITTEN_LATE
    on_arrival = fault in fault_transport.ON_ARRIVAL
    order = {"do": "faults", "fault": fault.value, "share": 0.2 if late else 0.85, "seed": seed}
    for worker in [rig.decode] if on_arrival else rig.prefill:
        await worker.tell(**order)
    cell.outcomes = await _many(rig, _requests(rig, count, seed, timeout_s=0.6 if late else 10.0))
    for worker in (rig.decode, *rig.prefill):
        await worker.tell(do="faults", fault=None)
    allowed = frozenset({EXACT}) if policy is Policy.AUTO else HANDOFF_ERRORS | LOST_OR_LATE | {EXACT}
    if late:
        allowed |= {"DeadlineExceeded"}  # the requests' own time is what ends them
    cell.judge(cell.outcomes, allowed, "request")
    cell.problems += await rig.leaks()
    await _account(cell, rig, {}, set(), cell.outcomes, collateral=fault is TransportFault.LINK_DROPPED)
    await _recovers(cell, rig)
    cell.seconds = clock() - begun_s
    return cell


# -- lost and doubled calls --------------------------------------------------------------------------------------------

NEVER_ANSWERED = frozenset({RpcFault.REQUEST_VANISHES, RpcFault.RESPONSE_VANISHES, RpcFault.LATE})


async def rpc_cell(rig: Rig, policy: Policy, method: str, fault: RpcFault, count: int, seed: int) -> CellResult:
    """Many requests while calls of one method are lost, doubled or late."""
    cell = CellResult("rpc", f"{method}: {fault.value}", rig.transport, policy)
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    chance = random.Random(seed)
    await rig.transfers()
    if method == "Handshake":
        await rig.respawn(rig.prefill[0])
    hit_requests: set[str] = set()
    hits_left = 3 if method == "Handshake" else 1_000_000
    if method == "Release":
        # A transfer that ends well is not released. These do not: the writer waits until it is told to stop, and cannot hear that
        # Run was given up.
        await rig.prefill[0].tell(do="faults", fault=TransportFault.WRITTEN_LATE.value, share=1.0, seed=seed)

    def plan(called: str, request: bytes) -> RpcFault | None:
        nonlocal hits_left
        if called == "Run" and method == "Release":
            return RpcFault.RESPONSE_VANISHES
        if called != method or hits_left == 0 or (method in ("Run", "Generate") and chance.random() > 0.6):
            return None
        hits_left -= 1
        if method == "Generate":
            hit_requests.add(worker_pb2.GenerateRequest.FromString(request).request.request_id)
        elif method == "Run":
            hit_requests.add(worker_pb2.PrefillRequest.FromString(request).request.request_id)
        else:
            cell.faulted += 1
        return fault

    proxies: list[RpcFaultProxy] = [rig.front] if method == "Generate" and rig.front is not None else rig.between
    for proxy in proxies:
        proxy.plan = plan
    timeout_s = 1.0 if method == "Generate" and fault in NEVER_ANSWERED else 10.0
    number = count // 2 if method == "Release" else count
    cell.outcomes = await _many(rig, _requests(rig, number, seed, timeout_s=timeout_s), concurrency=count)
    for proxy in proxies:
        proxy.plan = None
    await rig.prefill[0].tell(do="faults", fault=None)
    cell.faulted += sum(outcome.request_id.partition("#")[0] in hit_requests for outcome in cell.outcomes)
    allowed = frozenset({EXACT})
    if method == "Generate":
        allowed |= LOST_OR_LATE  # the client is the caller here; nobody retries for it
    elif policy is Policy.NEVER:
        allowed |= HANDOFF_ERRORS | LOST_OR_LATE
    cell.judge(cell.outcomes, allowed, "request")
    cell.problems += await rig.leaks()
    await _account(cell, rig, {}, set(), cell.outcomes, collateral=True)
    await _recovers(cell, rig)
    cell.seconds = clock() - begun_s
    return cell


async def info_cell(rig: Rig, fault: RpcFault) -> CellResult:
    """Info and Drain, the calls of the pool manager: a lost one may be repeated, a doubled one does nothing twice."""
    cell = CellResult("rpc", f"Info, Drain: {fault.value}", rig.transport, Policy.AUTO)
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    proxy = rig.front
    assert proxy is not None
    left = {"Info": 1, "Drain": 1}

    def plan(called: str, request: bytes) -> RpcFault | None:
        if left.get(called, 0) == 0:
            return None
        left[called] -= 1
        cell.faulted += 1
        return fault

    stub = worker_pb2_grpc.WorkerStub(rig._channel(proxy.address))
    started = asyncio.Event()
    running = asyncio.ensure_future(rig.ask(rig.request(prompt_of(3), max_tokens=40), started=started))
    await started.wait()
    proxy.plan = plan
    answered: list[worker_pb2.DrainReply] = []
    for _ in range(4):
        try:
            if await _called(lambda: stub.Info(worker_pb2.InfoRequest(), timeout=0.5)):
                break
        except grpc.aio.AioRpcError:
            continue
    for _ in range(4):
        try:
            answered.append(await stub.Drain(worker_pb2.DrainRequest(timeout_s=5.0), timeout=6.0 if answered else 1.5))
            break
        except grpc.aio.AioRpcError:
            continue
    proxy.plan = None
    cell.outcomes = [await running]
    cell.judge(cell.outcomes, frozenset({EXACT}), "the request that ran")
    info = await rig.info(rig.decode)
    if not answered or not answered[0].drained or info.state != "draining":
        cell.problems.append(f"not drained: {answered}, {info.state}")
    refused = await rig.ask(rig.request(prompt_of(4)))
    if refused.ending is not Ending.ERROR:
        cell.problems.append(f"a drained worker admitted a request: {refused.label}")
    cell.problems += await rig.leaks()
    await rig.respawn(rig.decode)
    await _recovers(cell, rig)
    cell.seconds = clock() - begun_s
    return cell


async def _called(call: Callable[[], grpc.aio.UnaryUnaryCall]) -> bool:
    await call()
    return True
