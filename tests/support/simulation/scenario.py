"""What one simulation does, as data drawn from a seed: workers, requests, what goes wrong and when.

A scenario is drawn in swarm fashion: each one has a few kinds of trouble, not a little of all. It can be made smaller (`without`)
and stays the same otherwise, which is how a failure is boiled down. Nothing here runs anything.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from random import Random

from support.simulation.network import Disorder, Point
from support.simulation.pool_cut import PoolCut

VOCABULARY = 1000
ALIKE = PoolCut(4)
UNEQUAL_BLOCKS = ((4, 8), (8, 4), (4, 2), (2, 4), (4, 3), (3, 4), (2, 8), (6, 4), (4, 6), (4, 4))
TRANSPORTS = (*(2 * [("cuda_ipc",), ("cuda_ipc", "tcp"), ("shm",)]), ("shm", "tcp"), ("tcp",))
LEASES_ARE_OVER_S = (4.5, 6.0)  # of what began with the scenario
ROUTER_BACKOFF_S = 0.05  # of `router.dispatch`, before it asks a lost worker again


class Trouble(enum.Enum):
    CRASH = "crash"  # SIGKILL; `lasts_s` later it is started again, or never
    ENGINE = "engine"  # its engine raises; soon after it ends, and `lasts_s` later it is started again, or never
    PAUSE = "pause"  # SIGSTOP, and SIGCONT `lasts_s` later
    LINK = "link"  # its data links break
    STALL = "stall"  # nothing gets through between it and `other` for `lasts_s`
    LATE = "late"  # the call that is being made at `point` arrives `lasts_s` late


@dataclass(frozen=True)
class Fault:
    """Happens at `at_s`, or when `point` was passed `count` times (by anybody)."""

    trouble: Trouble
    worker: str  # "p0", "d1", "r0"; "" is whoever passes the point
    at_s: float = 0.0
    point: Point | None = None
    count: int = 0
    lasts_s: float | None = None
    same_address: bool = False  # who is started again listens where the dead one did
    cut: str = ""  # the other end of a stall
    silent: bool = False  # a crash behind a partition: the other workers' connections are not reset, the router's are
    flushed: bool = False  # a crash after which everything that was sent still arrives


@dataclass(frozen=True)
class RequestPlan:
    name: str
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    num_choices: int
    timeout_s: float
    leaves_s: float | None = None  # the client goes away so long after it asked


@dataclass(frozen=True)
class Scenario:
    seed: int
    num_prefill: int
    num_decode: int
    prefill_tokens: int  # that a pool has room for
    decode_tokens: int
    transports: tuple[str, ...]
    local_prefill: str
    chunk_tokens: int
    step_tokens: int
    layer_groups: int
    max_running: int
    prefix_cache: bool
    narrow_window: bool  # of credit: four blocks
    ticket_ttl_s: float
    long_turns: float
    detection_s: float  # until the manager knows of a crash, at most
    news_s: float  # until the router knows what the manager knows, at most
    disorder: Disorder
    requests: tuple[RequestPlan, ...]
    faults: tuple[Fault, ...] = field(default=())
    guesses: bool = False  # decode workers check guesses, half of them wrong
    overlap: bool = False  # and plan steps while others are computed
    prefill_cut: PoolCut = ALIKE
    decode_cut: PoolCut = ALIKE

    @property
    def calm(self) -> bool:
        """Nothing goes wrong: every request must be served."""
        return not self.faults and self.disorder == Disorder()

    def text(self) -> str:
        """For people."""
        chosen = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("disorder", "requests", "faults")
        }
        troubles = {
            item.name: getattr(self.disorder, item.name) for item in fields(Disorder) if getattr(self.disorder, item.name)
        }
        lines = [", ".join(f"{name}={value}" for name, value in chosen.items()), f"disorder: {troubles or 'none'}"]
        return "\n".join([*lines, *map(str, self.requests), *map(str, self.faults)])

    def smaller(self) -> Iterator[tuple[str, Scenario]]:
        """Everything that can be left out, one thing at a time, and what is left."""
        for index, fault in enumerate(self.faults):
            yield (
                f"without {fault.trouble.value} of {fault.worker}",
                replace(self, faults=self.faults[:index] + self.faults[index + 1 :]),
            )
        for item in fields(Disorder):
            if getattr(self.disorder, item.name):
                yield f"without {item.name}", replace(self, disorder=replace(self.disorder, **{item.name: 0.0}))
        for index, request in enumerate(self.requests):
            if len(self.requests) > 1:
                yield (
                    f"without request {request.name}",
                    replace(self, requests=self.requests[:index] + self.requests[index + 1 :]),
                )
            if request.leaves_s is not None:
                stays = replace(request, leaves_s=None)
                yield (
                    f"{request.name} stays",
                    replace(self, requests=(*self.requests[:index], stays, *self.requests[index + 1 :])),
                )
        if self.long_turns:
            yield "without long turns", replace(self, long_turns=0.0)
        if self.guesses:
            yield "without guesses", replace(self, guesses=False)
        if self.overlap:
            yield "without overlap", replace(self, overlap=False)
        if self.prefill_cut != self.decode_cut:
            yield "with equal blocks", replace(self, prefill_cut=ALIKE, decode_cut=ALIKE)


def draw_scenario(seed: int) -> Scenario:
    random = Random(seed)
    num_prefill, num_decode = random.choice((1, 2, 2)), random.choice((1, 1, 2))
    stale = num_decode == 1 and random.random() < 0.15
    requests = tuple(_requests(random))
    too_late = num_decode == 2 and Random(seed ^ 0x1A7E).random() < 0.15
    if too_late:
        requests = (*requests[:-1], replace(requests[-1], at_s=Random(seed ^ 0xF37C).uniform(*LEASES_ARE_OVER_S)))
    cuts = _cuts(Random(seed ^ 0xB10C))
    workers = [f"p{index}" for index in range(num_prefill)] + [f"d{index}" for index in range(num_decode)]
    return Scenario(
        seed=seed,
        num_prefill=num_prefill,
        num_decode=num_decode,
        prefill_tokens=random.choice((32, 44, 76)),
        decode_tokens=random.choice((32, 44, 76)),
        transports=("tcp",) if stale else ("shm",) if too_late else random.choice(TRANSPORTS),
        local_prefill=random.choice(("never", "never", "auto")),
        chunk_tokens=random.choice((4, 7, 16)),
        step_tokens=random.choice((6, 16)),
        layer_groups=random.choice((1, 2)),
        max_running=random.choice((2, 4)),
        prefix_cache=random.random() < 0.8,
        narrow_window=random.random() < 0.5,
        ticket_ttl_s=random.choice((2.0, 10.0)),
        long_turns=random.choice((0.0, 0.0, 0.02)),
        detection_s=random.choice((0.01, 0.5)),
        news_s=0.5 if stale else random.choice((0.001, 0.02, 0.3)),
        disorder=_disorder(random),
        requests=requests,
        faults=(
            *(_stale_run(random) if stale else ()),
            *(_fetch_too_late(Random(seed ^ 0x57A1)) if too_late else ()),
            *_faults(random, workers),
        ),
        guesses=Random(seed ^ 0x6E55).random() < 0.5,
        overlap=Random(seed ^ 0x0E7A).random() < 0.5,
        prefill_cut=cuts[0],
        decode_cut=cuts[1],
    )


def _cuts(random: Random) -> tuple[PoolCut, PoolCut]:
    """Of prefill and decode workers: alike, or blocks of other sizes, or wider values too."""
    if random.random() < 0.6:
        return ALIKE, ALIKE
    here, there = random.choice(UNEQUAL_BLOCKS)
    return PoolCut(here, exact=False), PoolCut(there, wide=random.random() < 0.4, exact=False)


def _requests(random: Random) -> Iterator[RequestPlan]:
    shared = tuple(random.randrange(VOCABULARY) for _ in range(16))
    leaving = random.random() < 0.35
    for index in range(random.choice((2, 2, 3, 4))):
        own = tuple(random.randrange(VOCABULARY) for _ in range(random.randint(1, 16)))
        prompt = (*shared[: random.choice((0, 0, 4, 8, 11))], *own)
        yield RequestPlan(
            name=f"q{index}",
            at_s=random.random() * 0.03,
            prompt=prompt,
            max_tokens=random.randint(1, 6),
            seed=random.randrange(1 << 30),
            num_choices=random.choice((1, 1, 1, 2)),
            timeout_s=random.choice((3.0, 8.0, 20.0)),
            leaves_s=random.random() ** 2 * 0.06 if leaving and random.random() < 0.5 else None,
        )


def _disorder(random: Random) -> Disorder:
    disorder = Disorder()
    if random.random() < 0.25:
        disorder.spike = random.choice((0.01, 0.1))
    if random.random() < 0.2:
        disorder.request_lost = random.choice((0.05, 0.2))
        disorder.response_lost = random.choice((0.05, 0.2))
    if random.random() < 0.15:
        disorder.duplicated = 0.2
    if random.random() < 0.1:
        disorder.black_hole = 0.1
    if random.random() < 0.2:
        disorder.flipped = random.choice((0.02, 0.1))
    if random.random() < 0.15:
        disorder.skipped = 0.05
    if random.random() < 0.15:
        disorder.repeated = 0.1
    return disorder


def _faults(random: Random, workers: list[str]) -> Iterator[Fault]:
    for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3))):
        trouble = random.choice(_TROUBLES)
        worker = random.choice(workers)
        lasts_s: float | None = random.choice((0.02, 0.3, 1.0, 3.0, 6.0, 18.0))
        if trouble in (Trouble.CRASH, Trouble.ENGINE):
            lasts_s = random.choice((None, 0.01, 0.1, 1.0))
            if trouble is Trouble.CRASH and random.random() < 0.1:
                worker, lasts_s = "r0", None
        point = random.choice(tuple(Point)) if random.random() < 0.6 else None
        yield Fault(
            trouble,
            worker,
            at_s=random.random() * 0.08,
            point=point,
            count=random.randint(1, 6),
            lasts_s=lasts_s,
            same_address=random.random() < 0.5,
            cut=random.choice(workers),
            silent=random.random() < 0.2,
        )


_TROUBLES = (
    *(2 * [Trouble.CRASH]),
    *(3 * [Trouble.PAUSE]),
    Trouble.ENGINE,
    Trouble.LINK,
    Trouble.STALL,
)


def _stale_run(random: Random) -> Iterator[Fault]:
    """The only decode worker dies and comes back at once, where it was, before anybody is told. A Run of its former life is still
    on its way: that arrives at about the time when the request is sent out again."""
    count = random.randint(1, 3)
    late_s = ROUTER_BACKOFF_S + 0.0002 + 0.002 * random.random()
    yield Fault(Trouble.LATE, "", point=Point.RUN_SENT, count=count, lasts_s=late_s)
    yield Fault(Trouble.CRASH, "", point=Point.RUN_SENT, count=count, lasts_s=0.01, same_address=True, flushed=True, silent=True)


def _fetch_too_late(random: Random) -> Iterator[Fault]:
    """A decode worker is stopped when something is ready for it, until its lease is over and another prompt has come."""
    worker, count = random.choice(("d0", "d1")), random.randint(1, 4)
    yield Fault(Trouble.PAUSE, worker, point=Point.READY_SENT, count=count, lasts_s=random.uniform(6.5, 9.0))
