"""One simulated cluster: the real control code of prefill workers, decode workers and a router, on virtual time.

    Scenario -> World: processes (hosts), network, clients, faults -> Verdict

What is real: `kvtransfer` above its transports, `PrefillRuns`, `PrefillHandoff`, `PrefillScheduler`, `DecodeStreams`,
`DecodeHandoff`, `DecodeScheduler`, `GrpcPrefillPeer`, `BlockManager`, the router's `Dispatcher` with registry, links and ledger,
and all messages. What stands in: event loop, network, data links, gRPC's transport, engine and its thread, the pool manager (it
publishes snapshots, some time after the fact).

The judge looks all the time (`pool.Memory`) and at the end (`Verdict`): tokens, endings, deadlines, leaks.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import structlog

import decode_worker.prefill_peer
import router.links
from common.errors import PdserveError
from common.types import FinishReason, Request, Role, SamplingParams, WorkerRef, WorkerState
from common.wire import registry_pb2, types_pb2, worker_pb2
from kvtransfer import recutting
from support.simulation import oracle, rpc
from support.simulation.hosts import MODEL, DecodeProcess, Host, PrefillProcess, RouterProcess, WorkerProcess
from support.simulation.network import Disorder, Network, Point
from support.simulation.scenario import Fault, RequestPlan, Scenario, Trouble
from support.simulation.sender_links import MappingSenderLink, watched_gather
from support.simulation.virtual_loop import Deadlock, OutOfTime, ProcessLoop, VirtualTime

DEADLINE_SLACK_S = 0.5  # a request ends at most so long after its deadline
DRAIN_S = 15.0  # after the last request, and once everybody runs again, everything is given back by then
LOOK_S = 0.01
LEASE_IS_OVER_S = 5.0  # a prefill worker holds nothing for a decode worker that has been silent for so long
STOP_S = 3.0  # for the orderly stop of a worker that has nothing to do
START_S = 5.0
ENGINE_FAILURE_S = 0.05  # until a worker whose engine failed has ended


@dataclass
class Ending:
    """What one client saw."""

    plan: RequestPlan
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, FinishReason] = field(default_factory=dict)
    how: str = ""  # "served", "left", "router lost", or the name of an error
    ended_s: float = 0.0


@dataclass
class Verdict:
    scenario: Scenario
    complaints: list[str]
    endings: list[Ending]
    history: int
    virtual_s: float
    num_turns: int
    drained_s: float  # from the last ending, with everybody running again, until everything was given back
    points: dict[Point, int]
    stale_fetches: int

    @property
    def ok(self) -> bool:
        return not self.complaints


class World:
    def __init__(self, scenario: Scenario, trace: Callable[[str], None] | None = None) -> None:
        self.scenario = scenario
        self.random = Random(scenario.seed ^ 0x5EED)
        self.time = VirtualTime(Random(scenario.seed ^ 0x71E), long_turns=scenario.long_turns, trace=trace)
        self.network = Network(self.time, Random(scenario.seed ^ 0x2E7), scenario.disorder)
        self.network.on_point = self._on_point
        self.hosts: dict[str, Host] = {}  # by name, the latest incarnation of each
        self.graveyard: list[Host] = []
        self.endings: list[Ending] = []
        self._known: dict[str, tuple[Role, WorkerRef, WorkerState]] = {}  # what the manager knows
        self._begun = False  # everybody is ready: requests and faults come from now on
        self._begin_s = 0.0
        self._version = 0
        self._snapshot_s = 0.0
        self._numbers = 0
        self._open = 0
        self._healed = False
        self._over = False  # judged: what still happens is only the end of coroutines
        self._armed = [fault for fault in scenario.faults if fault.point is not None]

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    # -- one run ------------------------------------------------------------------------------------------------------

    def run(self) -> Verdict:
        scenario, complaints = self.scenario, self.network.witness.complaints
        drained_s = 0.0
        self._start_all()
        self._begin_s = begin_s = self.time.now_s
        last_s = 0.0
        for plan in scenario.requests:
            self._open += 1
            self.time.at(begin_s + plan.at_s, self._ask, plan)
            last_s = max(last_s, begin_s + plan.at_s + plan.timeout_s + DEADLINE_SLACK_S)
        for fault in scenario.faults:
            if fault.point is None:
                self.time.at(begin_s + fault.at_s, self._strike, fault)
        try:
            self.time.run(lambda: self._open == 0, until_s=last_s, what="the end of every request")
            self._heal()
            healed_s = self.time.now_s
            drained_s = self._drain(healed_s)
            self._stop_all()
        except (Deadlock, OutOfTime) as error:
            unended = [ending.plan.name for ending in self.endings if not ending.how]
            complaints.append(f"{error}; requests that have not ended: {unended or 'none'}; left over: {self._leftovers()}")
        except Exception as error:  # noqa: BLE001 (whatever the code under test lets out of a callback is a finding)
            complaints.append("".join(traceback.format_exception(error)[-2:]).strip())
        complaints.extend(self._judge_endings())
        verdict = Verdict(
            scenario,
            complaints,
            self.endings,
            self.time.history,
            self.time.now_s,
            self.time.num_turns,
            drained_s,
            dict(self.network.witness.points),
            self.network.witness.stale_fetches,
        )
        self._bury_all()
        return verdict

    def _start_all(self) -> None:
        for index in range(self.scenario.num_prefill):
            self._start_worker(PrefillProcess, f"p{index}", 1, None)
        for index in range(self.scenario.num_decode):
            self._start_worker(DecodeProcess, f"d{index}", 1, None)
        router_host = self.hosts["r0"] = RouterProcess(self, "r0", 1, "r0", "")
        router_host.loop.call(router_host.loop.create_task, router_host.start())
        ready = self.scenario.num_prefill + self.scenario.num_decode
        self.time.run(
            lambda: sum(view.state is WorkerState.READY for view in router_host.view) == ready, until_s=START_S, what="readiness"
        )
        self._begun = True

    def _start_worker(self, kind: type[WorkerProcess], name: str, incarnation: int, addresses: tuple[str, str] | None) -> None:
        address, data_address = addresses or (f"{name}#{incarnation}:grpc", f"{name}#{incarnation}:data")
        host = self.hosts[name] = kind(self, name, incarnation, address, data_address)
        self.time.tell(host.loop.name, "starts")
        self._manager_learns(kind.role, host.ref, WorkerState.STARTING, 0.0)
        task = host.loop.call(host.loop.create_task, host.start())
        task.add_done_callback(lambda _: self._manager_learns(kind.role, host.ref, WorkerState.READY, 1e-3))

    def _drain(self, healed_s: float) -> float:
        """Returns when everything was given back and nobody is busy any more: how long it took until the last block was."""
        found = ["not looked yet"]
        drained_s = healed_s

        def look() -> None:
            nonlocal found, drained_s
            found = self._leftovers()
            if found:
                drained_s = self.time.now_s
            else:
                found = [text for host in self._workers() for text in host.residue()]
            if found:
                self.time.after(LOOK_S, look)

        # What was held up by a stall is still to come.
        self.time.at(max(healed_s, self.network.stalls_end_s) + 2 * LOOK_S, look)
        try:
            self.time.run(lambda: not found, until_s=healed_s + DRAIN_S, what="the return of everything that was lent")
        except OutOfTime as error:
            raise OutOfTime(f"{error}: {found}") from None
        return drained_s - healed_s

    def _workers(self) -> list[WorkerProcess]:
        return [host for host in self.hosts.values() if isinstance(host, WorkerProcess) and host.loop.alive]

    def _stop_all(self) -> None:
        stopping = [(host, host.loop.call(host.loop.create_task, host.stop())) for host in self._workers()]
        # One whose engine had failed may be given up, and killed, in the middle of it.
        self.time.run(
            lambda: all(task.done() or not host.loop.alive for host, task in stopping),
            until_s=self.time.now_s + STOP_S,
            what="an orderly stop",
        )
        for _, task in stopping:
            if task.done() and not task.cancelled() and task.exception() is not None:
                self.network.complain(f"an orderly stop ends in {task.exception()!r}")

    def _bury_all(self) -> None:
        self._over = True
        self.time.trace = None
        self.network.on_point = None
        for host in (*self.hosts.values(), *self.graveyard):
            host.loop.bury()

    # -- clients ------------------------------------------------------------------------------------------------------

    def _ask(self, plan: RequestPlan) -> None:
        ending = Ending(plan)
        self.endings.append(ending)
        host = self.hosts["r0"]
        if not host.loop.alive:
            self._end(ending, "router lost")
            return
        assert isinstance(host, RouterProcess)
        task = host.loop.call(host.loop.create_task, self._client(plan, host, ending))

        def ended(task: asyncio.Task[None]) -> None:
            if task.cancelled():
                self._end(ending, "left")
            elif (error := task.exception()) is None:
                self._end(ending, "served")
            elif isinstance(error, PdserveError):
                self._end(ending, error.code, error.message)
            else:
                self._end(ending, repr(error))
                self.network.complain(f"request {plan.name} ends in {error!r}")

        task.add_done_callback(ended)
        if plan.leaves_s is not None:
            self.time.after(plan.leaves_s, lambda: host.loop.alive and host.loop.call_soon(task.cancel))

    async def _client(self, plan: RequestPlan, host: RouterProcess, ending: Ending) -> None:
        request = Request(
            request_id=plan.name,
            model=MODEL,
            prompt_token_ids=plan.prompt,
            sampling=SamplingParams(max_tokens=plan.max_tokens, seed=plan.seed),
            num_choices=plan.num_choices,
            timeout_s=plan.timeout_s,
        )
        async with aclosing(host.dispatcher.generate(request)) as events:
            async for event in events:
                for chunk in event.chunks:
                    if chunk.choice in ending.finished:
                        self.network.complain(f"request {plan.name}: more after choice {chunk.choice} had finished")
                    ending.tokens.setdefault(chunk.choice, []).extend(chunk.token_ids)
                    if chunk.finish_reason is not None:
                        ending.finished[chunk.choice] = chunk.finish_reason

    def _end(self, ending: Ending, how: str, why: str = "") -> None:
        if self._over:
            return
        if ending.how:
            self.network.complain(f"request {ending.plan.name} ends twice: {ending.how}, {how}")
            return
        self.time.tell("client", f"{ending.plan.name}: {how} {why}")
        ending.how = how
        ending.ended_s = self.time.now_s
        self._open -= 1

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def _on_point(self, point: Point, process: ProcessLoop) -> None:
        if not self._armed:
            return
        passed = self.network.witness.points[point]
        for fault in self._armed:
            if fault.point is point and fault.count == passed and fault.trouble is Trouble.LATE:
                self._strike(fault, process)
            elif fault.point is point and fault.count == passed:
                # Not now: the process is in the middle of something, and nothing in it is ever interrupted there.
                self.time.after(self.random.random() * 200e-6, self._strike, fault, process)

    def _strike(self, fault: Fault, process: ProcessLoop | None = None) -> None:
        host = self.hosts.get(fault.worker) if fault.worker or process is None else process.host
        if host is None or not host.loop.alive or self._healed:
            return
        self.time.tell(
            "fault", f"{fault.trouble.value} of {host.loop.name}" + (f" for {fault.lasts_s} s" if fault.lasts_s else "")
        )
        match fault.trouble:
            case Trouble.CRASH:
                self._crash(host, fault)
            case Trouble.ENGINE:
                self._fail_engine(host, fault)
            case Trouble.LATE:
                self.network.next_call_late_s = fault.lasts_s or 0.1
            case Trouble.PAUSE:
                self._pause(host, fault.lasts_s or 1.0)
            case Trouble.LINK:
                self._break_links(host)
            case Trouble.STALL:
                other = self.hosts[fault.cut]
                self.network.stall(host.loop.name, other.loop.name, self.time.now_s + min(fault.lasts_s or 1.0, 8.0))

    def _fail_engine(self, host: Host, fault: Fault) -> None:
        if isinstance(host, WorkerProcess) and host.loop.running and hasattr(host, "server"):
            host.engine.fail()
            host.loop.call_soon(host.engine_failed)
            self.time.after(ENGINE_FAILURE_S, lambda: host.loop.alive and self._crash(host, fault))

    def _watch_leases(self, gone: Host) -> None:
        """What prefill workers hold for a decode worker that is gone, or stopped, they hold for a limited time."""
        held = {
            host: host.open_for(gone.ref)
            for host in self._workers()
            if isinstance(host, PrefillProcess) and host.loop.running and hasattr(host, "server")
        }
        pauses = {host: host.num_pauses for host in held}

        def check() -> None:
            if gone.loop.running:
                return
            for host, nonces in held.items():
                undisturbed = host.loop.running and host.num_pauses == pauses[host]
                if undisturbed and (still := nonces & host.open_for(gone.ref)):
                    text = f"holds {len(still)} transfers of {gone.loop.name}, {LEASE_IS_OVER_S} s after that was gone"
                    self.network.complain(f"{host.loop.name} {text}")

        self.time.after(LEASE_IS_OVER_S, check)

    def _crash(self, host: Host, fault: Fault) -> None:
        if isinstance(host, DecodeProcess):
            self._watch_leases(host)
        host.loop.kill()
        self.network.killed(host.loop, silently=fault.silent, flushed=fault.flushed)
        for link in tuple(host.sender_links):
            link.leave_all()
        self.graveyard.append(host)
        if isinstance(host, RouterProcess):
            for ending in self.endings:
                if not ending.how:
                    self._end(ending, "router lost")
            return
        assert isinstance(host, WorkerProcess)
        self._manager_learns(host.role, host.ref, WorkerState.FAILED, self.random.random() * self.scenario.detection_s)
        if fault.lasts_s is not None:
            addresses = (host.ref.address, host.data_address) if fault.same_address else None
            self.time.after(fault.lasts_s, self._start_again, type(host), host, addresses)

    def _start_again(self, kind: type[WorkerProcess], dead: Host, addresses: tuple[str, str] | None) -> None:
        if self.hosts[dead.name] is dead and not self._healed:
            self._start_worker(kind, dead.name, dead.ref.incarnation + 1, addresses)

    def _pause(self, host: Host, lasts_s: float) -> None:
        if isinstance(host, RouterProcess):
            return
        if isinstance(host, DecodeProcess):
            self._watch_leases(host)
        host.num_pauses += 1
        host.loop.pause()
        self.network.paused(host.loop, lambda: host.loop.alive and not host.loop.running)
        self.time.after(lasts_s, host.loop.resume)

    def _break_links(self, host: Host) -> None:
        for wire in self.network.between(host.loop):
            if not wire.pinged:
                self._break(wire)

    def _break(self, wire: Any) -> None:
        sender: Host = wire.a.host
        by_itself = [link for link in sender.sender_links if link.uses(wire) and isinstance(link, MappingSenderLink)]
        for link in by_itself:
            if sender.loop.running:
                sender.loop.call_soon(link.lose)
        if not by_itself:
            wire.reset()

    def _heal(self) -> None:
        """From here on everything works, so that what does not come to its end has no excuse."""
        self._healed = True
        self.time.tell("world", "all requests have ended; everybody runs again")
        self.network.disorder = Disorder()
        for host in self.hosts.values():
            if host.loop.life.value == "paused":
                host.loop.resume()

    # -- the manager --------------------------------------------------------------------------------------------------

    def _manager_learns(self, role: Role, ref: WorkerRef, state: WorkerState, delay_s: float) -> None:
        def learn() -> None:
            known = self._known.get(ref.worker_id)
            if known is not None and known[1].incarnation > ref.incarnation:
                return
            if known is not None and known[1] == ref and known[2] is WorkerState.FAILED:
                return
            self._known[ref.worker_id] = (role, ref, state)
            self._publish()

        if delay_s:
            self.time.after(delay_s, learn)
        else:
            learn()

    def _publish(self) -> None:
        self._version += 1
        snapshot = registry_pb2.ClusterSnapshot(
            version=self._version,
            models=[registry_pb2.ModelInfo(name=MODEL, context_tokens=1000)],
            workers=[
                worker_pb2.InfoReply(
                    worker_id=ref.worker_id,
                    incarnation=ref.incarnation,
                    address=ref.address,
                    role=types_pb2.ROLE_PREFILL if role is Role.PREFILL else types_pb2.ROLE_DECODE,
                    model=MODEL,
                    state=str(state),
                )
                for role, ref, state in self._known.values()
                if state is not WorkerState.FAILED
            ],
        )
        delay_s = self.scenario.news_s * (0.5 + 0.5 * self.random.random()) if self._begun else 0.0
        self._snapshot_s = max(self._snapshot_s, self.time.now_s + delay_s)
        self.time.at(self._snapshot_s, self._tell_routers, snapshot)

    def _tell_routers(self, snapshot: registry_pb2.ClusterSnapshot) -> None:
        host = self.hosts.get("r0")
        if isinstance(host, RouterProcess) and host.loop.alive:
            host.loop.call_soon(lambda: host.registry.apply(snapshot))

    # -- the judgement ------------------------------------------------------------------------------------------------

    def _leftovers(self) -> list[str]:
        return [text for host in self._workers() for text in (host.leftovers() if hasattr(host, "server") else ["not started"])]

    def _judge_endings(self) -> Iterator[str]:
        for ending in self.endings:
            plan = ending.plan
            for choice in range(plan.num_choices):
                expected = oracle.answer(plan.prompt, plan.max_tokens, plan.seed, choice)
                got = tuple(ending.tokens.get(choice, ()))
                if got != expected[: len(got)]:
                    yield f"request {plan.name}, choice {choice}: wrong tokens {got}, expected {expected}"
                elif ending.how == "served" and (len(got) != len(expected) or choice not in ending.finished):
                    yield f"request {plan.name}, choice {choice}: served with {len(got)} of {len(expected)} tokens"
            if ending.how and self.scenario.calm and plan.leaves_s is None and ending.how != "served":
                yield f"request {plan.name} ends in {ending.how} though nothing went wrong"
            late_s = ending.ended_s - (self._begin_s + plan.at_s + plan.timeout_s)
            if ending.how and late_s > DEADLINE_SLACK_S:
                yield f"request {plan.name} ends {late_s:.3f} s after its deadline"
        for host in (*self.hosts.values(), *self.graveyard):
            for complaint in host.loop.complaints:
                yield f"{host.loop.name}: {complaint}"


@contextmanager
def simulated_rpc() -> Iterator[None]:
    """While this is open, channels lead into the simulation, blocks that are cut anew are cut one at a time and under watch, and
    nothing is logged."""
    before = (router.links.connect, decode_worker.prefill_peer.connect)
    cutting = (recutting.gather_piece, recutting.STAGING_BYTES)
    configured = structlog.get_config()
    recutting.gather_piece, recutting.STAGING_BYTES = watched_gather, 1
    router.links.connect = decode_worker.prefill_peer.connect = rpc.connect
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        router.links.connect, decode_worker.prefill_peer.connect = before
        recutting.gather_piece, recutting.STAGING_BYTES = cutting
        structlog.configure(**configured)


def simulate(scenario: Scenario, trace: Callable[[str], None] | None = None) -> Verdict:
    """Runs one scenario to its end. Deterministic: the same scenario gives the same verdict, history included."""
    return World(scenario, trace).run()
