"""What the autoscaler is worth on real workers: a load that turns from prompts to outputs and back, on every fixed split of the
workers and on pools that size themselves, with the same arrivals and every answer checked.

    one lone worker           answers each question alone, and shows what a worker can do: rates and promises follow from that
    each arrangement          night (little) -> prompts -> outputs -> prompts, an open loop: who is late does not slow the rest
    a table                   share of the requests that kept TTFT and TPOT, worker-seconds, flips, failed and inexact answers

Workers compute with one thread in exact mode and keep no prefixes, so that a worker's capacity is its own and equal questions are
equal work. Rates are above what one worker of a pool can do and below what two can: a fixed split is wrong in some phase. The
pools that size themselves begin with one worker each and may have as many as the fixed splits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from common.rpc import connect
from common.wire.registry_pb2 import AutoscalerRequest, StatusRequest
from common.wire.registry_pb2_grpc import ControlStub
from deploy.cluster_state import running_state
from support.cluster import RunningCluster, launched
from support.exact_load import Ask, asks
from support.tiny_models import make_tiny_model

MODEL = "tiny"
NIGHT = 0.1
LOOK_S = 0.5
GRACE_S = 60.0  # for answers that are late
TTFT_FACTOR, TPOT_FACTOR = 4.0, 4.0  # promises, in times of what a lone request gets
AUTOSCALING: dict[str, Any] = {
    "mode": "on",
    "look_back_period_s": 2.0,
    "flip_delay_s": 1.0,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 60.0,
    "cooldown_s": 2.0,
    "interval_s": 0.5,
}


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What one worker can do, and from it what is asked and promised."""

    prompts_per_s: float
    outputs_per_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    phase: str
    ask: Ask


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[int, ...] = ()
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    failure: str = ""


@dataclass(slots=True)
class Row:
    name: str
    good: dict[str, float] = field(default_factory=dict)  # share, by phase; "" for all
    requests: int = 0
    failed: int = 0
    inexact: int = 0
    worker_s: float = 0.0
    flips: int = 0
    grown: int = 0
    shrunk: int = 0
    sizes: list[tuple[float, int, int]] = field(default_factory=list)  # when, prefill, decode: each change
    failures: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A day and a night: every fixed split, and the autoscaler.")
    parser.add_argument("--phase-s", type=float, default=40.0, help="length of a phase; the night before them is a quarter of it")
    parser.add_argument("--workers", type=int, default=3, help="most workers of both pools together")
    parser.add_argument("--load", type=float, default=1.35, help="what is asked, in times of what one worker of a pool can do")
    parser.add_argument("--only", action="append", help="an arrangement: 1+2, 2+1, ..., autoscaler; may be given again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one object per arrangement")
    given = parser.parse_args(arguments)
    if given.workers < 3 or given.phase_s < 5:
        parser.error("--workers must be 3 at least, --phase-s 5")
    arrangements = [f"{prefill}+{given.workers - prefill}" for prefill in range(1, given.workers)] + ["autoscaler"]
    chosen = given.only or arrangements
    if unknown := set(chosen) - set(arrangements):
        parser.error(f"no such arrangement: {', '.join(sorted(unknown))}; there are {', '.join(arrangements)}")
    kinds = {
        "prompts": asks(10, prompt_tokens=600, max_tokens=4, seed=1),
        "outputs": asks(10, prompt_tokens=24, max_tokens=48, seed=2),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make_tiny_model(folder / "model", seed=4, layers=8, hidden=384, heads=6, kv_heads=2, head_dim=64, ffn=1536)
        with _cluster(folder / "lone", path, prefill=0, decode=1) as cluster:
            expected, yardstick = asyncio.run(_measure(cluster.base_url, kinds))
        _say(
            f"one worker: {yardstick.prompts_per_s:.2f} prompts/s or {yardstick.outputs_per_s:.2f} outputs/s;"
            f" asked {given.load:g} times that; good: TTFT <= {yardstick.ttft_s:.2f} s, TPOT <= {yardstick.tpot_s * 1e3:.0f} ms"
        )
        arrivals = list(_arrivals(kinds, yardstick, given.phase_s, load=given.load, seed=given.seed))
        rows = []
        for arrangement in chosen:
            if arrangement == "autoscaler":
                sizing = _sizing(given.workers, yardstick)
                running = _cluster(folder / arrangement, path, prefill=1, decode=1, autoscaling=sizing)
            else:
                prefill, decode = (int(part) for part in arrangement.split("+"))
                running = _cluster(folder / arrangement, path, prefill=prefill, decode=decode)
            with running as cluster:
                cluster.wait_for(
                    "every worker", lambda: {one["state"] for one in cluster.status()["workers"]} == {"ready"}, 240.0
                )
                row = asyncio.run(_drive(arrangement, cluster, arrivals, expected, yardstick))
            rows.append(row)
            _say(json.dumps(_described(row)) if given.json else _line(row))
    for row in rows:
        for text in row.failures[:3]:
            _say(f"{row.name}: {text}")
    return 1 if any(row.failed or row.inexact for row in rows) else 0


@contextmanager
def _cluster(
    folder: Path, path: Path, *, prefill: int, decode: int, autoscaling: Mapping[str, Any] | None = None
) -> Iterator[RunningCluster]:
    folder.mkdir()
    model = {
        "name": MODEL,
        "source": str(path),
        "engine": {"dtype": "float32", "exact": True, "kv_pool_tokens": 16_384, "threads": 1, "prefix_cache": False},
        "prefill": {"replicas": prefill},
        "decode": {
            "replicas": decode,
            "local_prefill": "never" if prefill else "always",
            "speculation": {"method": "off"},
        },
        "autoscaling": autoscaling or {},
    }
    with launched(folder, model_path=path, name="day", settings={"models": [model]}) as running:
        yield running


def _sizing(workers: int, yardstick: Yardstick) -> dict[str, Any]:
    """It aims at less than what is promised, as an operator would."""
    pool = {"max_replicas": workers - 1}
    targets = {"target_ttft_s": 0.5 * yardstick.ttft_s, "target_tpot_s": 0.75 * yardstick.tpot_s}
    return {**AUTOSCALING, **targets, "max_workers": workers, "prefill": pool, "decode": pool}


# -- the yardstick -----------------------------------------------------------------------------------------------------


async def _measure(base_url: str, kinds: Mapping[str, Sequence[Ask]]) -> tuple[dict[Ask, tuple[int, ...]], Yardstick]:
    """Each question alone, and then all of a kind at once: every answer of a worker that nobody else disturbs."""
    async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=GRACE_S) as http:
        expected: dict[Ask, tuple[int, ...]] = {}
        ttft_s, tpot_s, per_s = [], [], {}
        for kind, wanted in kinds.items():
            for ask in wanted:
                answer = await _ask(http, ask)
                if answer.failure:
                    raise RuntimeError(f"the lone worker failed: {answer.failure}")
                expected[ask] = answer.tokens
                (ttft_s if kind == "prompts" else tpot_s).append(answer.ttft_s if kind == "prompts" else answer.tpot_s)
            began_s = time.monotonic()
            together = await asyncio.gather(*(_ask(http, ask) for ask in wanted))
            per_s[kind] = len(wanted) / (time.monotonic() - began_s)
            if any(answer.tokens != expected[ask] for ask, answer in zip(wanted, together, strict=True)):
                raise RuntimeError("the lone worker does not answer the same twice")
    promised = (TTFT_FACTOR * sum(ttft_s) / len(ttft_s), TPOT_FACTOR * sum(tpot_s) / len(tpot_s))
    return expected, Yardstick(per_s["prompts"], per_s["outputs"], *promised)


def _arrivals(
    kinds: Mapping[str, Sequence[Ask]], yardstick: Yardstick, phase_s: float, *, load: float, seed: int
) -> Iterator[Arrival]:
    draw = random.Random(seed)
    prompts, outputs = load * yardstick.prompts_per_s, load * yardstick.outputs_per_s
    phases = (
        ("night", phase_s / 4, {"prompts": NIGHT * prompts, "outputs": NIGHT * outputs}),
        ("morning: prompts", phase_s, {"prompts": prompts, "outputs": NIGHT * outputs}),
        ("noon: outputs", phase_s, {"prompts": NIGHT * prompts, "outputs": outputs}),
        ("evening: prompts", phase_s, {"prompts": prompts, "outputs": NIGHT * outputs}),
    )
    begun_s = 0.0
    for phase, length_s, rates in phases:
        at_s = begun_s
        while (at_s := at_s + draw.expovariate(sum(rates.values()))) < begun_s + length_s:
            (kind,) = draw.choices(list(rates), weights=list(rates.values()))
            yield Arrival(at_s, phase, draw.choice(kinds[kind]))
        begun_s += length_s


# -- one arrangement ---------------------------------------------------------------------------------------------------


async def _drive(
    name: str,
    cluster: RunningCluster,
    arrivals: Sequence[Arrival],
    expected: Mapping[Ask, tuple[int, ...]],
    yardstick: Yardstick,
) -> Row:
    row = Row(name, requests=len(arrivals))
    base_url = await asyncio.to_thread(lambda: cluster.base_url)
    limits = httpx.Limits(max_connections=1000)
    async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=GRACE_S, limits=limits) as http:
        began_s = time.monotonic()
        stop = asyncio.Event()
        watching = asyncio.create_task(_watch(cluster, row, began_s, stop))
        asking = [asyncio.create_task(_at(http, began_s + one.at_s, one.ask)) for one in arrivals]
        answers = await asyncio.gather(*asking)
        stop.set()
        await watching
    kept: Counter[str] = Counter()
    for arrival, answer in zip(arrivals, answers, strict=True):
        inexact = not answer.failure and answer.tokens != expected[arrival.ask]
        row.failed += bool(answer.failure)
        row.inexact += inexact
        if answer.failure or inexact:
            row.failures.append(answer.failure or f"{len(arrival.ask.prompt)} prompt tokens: other tokens than alone")
        elif answer.ttft_s <= yardstick.ttft_s and answer.tpot_s <= yardstick.tpot_s:
            kept[arrival.phase] += 1
    asked = Counter(arrival.phase for arrival in arrivals)
    row.good = {"": sum(kept.values()) / len(arrivals)} | {phase: kept[phase] / count for phase, count in asked.items()}
    return row


async def _at(http: httpx.AsyncClient, at_s: float, ask: Ask) -> Answer:
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))
    return await _ask(http, ask)


async def _ask(http: httpx.AsyncClient, ask: Ask) -> Answer:
    body = {**ask.body(MODEL), "stream": True, "return_token_ids": True}
    body.pop("logprobs")
    tokens: list[int] = []
    asked_s = first_s = last_s = time.monotonic()
    try:
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                return Answer(failure=f"{reply.status_code}: {(await reply.aread()).decode()[:200]}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                told = json.loads(line.removeprefix("data: "))
                if "error" in told:
                    return Answer(failure=str(told["error"])[:200])
                for choice in told["choices"]:
                    if choice["token_ids"]:
                        last_s = time.monotonic()
                        first_s = first_s if tokens else last_s
                        tokens += choice["token_ids"]
    except httpx.HTTPError as error:
        return Answer(failure=f"{type(error).__name__}: {error}")
    if len(tokens) != ask.max_tokens:
        return Answer(failure=f"{len(tokens)} of {ask.max_tokens} tokens")
    return Answer(tuple(tokens), first_s - asked_s, (last_s - first_s) / max(1, len(tokens) - 1))


async def _watch(cluster: RunningCluster, row: Row, began_s: float, stop: asyncio.Event) -> None:
    """Which workers there are, twice a second, and at the end what the autoscaler did."""
    state = running_state(Path(cluster.environment["PDSERVE_HOME"]), cluster.name)
    channel = connect(state.manager_address, state.token)
    control = ControlStub(channel)
    try:
        looked_s = time.monotonic()
        while not stop.is_set():
            snapshot = await control.Status(StatusRequest(), timeout=15.0)
            now_s = time.monotonic()
            row.worker_s += sum(worker.pid != 0 for worker in snapshot.workers) * (now_s - looked_s)
            looked_s = now_s
            ready = Counter(worker.worker_id.split("/")[1] for worker in snapshot.workers if worker.state == "ready")
            sizes = (ready["prefill"], ready["decode"])
            if not row.sizes or row.sizes[-1][1:] != sizes:
                row.sizes.append((round(now_s - began_s, 1), *sizes))
            try:
                await asyncio.wait_for(stop.wait(), LOOK_S)
            except TimeoutError:
                continue
        report = await control.Autoscaler(AutoscalerRequest(model=MODEL), timeout=15.0)
    finally:
        await channel.close(None)
    done = Counter(decision.action for model in report.models for decision in model.decisions if decision.performed)
    row.flips, row.grown, row.shrunk = done["flip"], done["grow"], done["shrink"]


# -- what is said ------------------------------------------------------------------------------------------------------


def _described(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__slots__}


def _line(row: Row) -> str:
    phases = ", ".join(f"{phase} {share:.0%}" for phase, share in row.good.items() if phase)
    sizes = " ".join(f"{at_s:g}s:{prefill}+{decode}" for at_s, prefill, decode in row.sizes)
    return (
        f"{row.name:10} good {row.good['']:6.1%} of {row.requests} ({phases}); worker-seconds {row.worker_s:.0f};"
        f" flips {row.flips}, grown {row.grown}, shrunk {row.shrunk}; failed {row.failed}, inexact {row.inexact}; {sizes}"
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
