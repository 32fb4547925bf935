"""The whole chaos campaign, and the table that it writes.

    processes    every step of the protocol x SIGKILL, SIGSTOP...SIGCONT, SIGSTOP...SIGKILL x link x policy
    link         every fault that a network can do to a data link, on live workers under load (tcp)
    transport    every fault that a decorated link or memory can do, on live workers under load
    rpc          every control call lost, doubled, late
    recut        the most telling of these with a prefill worker whose blocks are of another size
    unfenced     what is left of these where the decode worker cannot shut out a writer, and has to wait for it
    healthy      a hundred thousand blocks and more per link with no fault at all

`run` does it and returns a `Report`; `Report.markdown` is the file that stands beside the tests. Figures that depend on the
machine are left out of it, but for the slowest cell.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common.errors import HandoffError, StartupError
from support.chaos.bulk import BulkResult, move_blocks
from support.chaos.cells import (
    WRITER_OPEN_STEPS,
    CellResult,
    Policy,
    Signal,
    info_cell,
    link_cell,
    process_cell,
    rpc_cell,
    transport_cell,
)
from support.chaos.fault_transport import TransportFault, faults_over
from support.chaos.oracle import Oracle
from support.chaos.processes import Times
from support.chaos.rig import Ending, Rig, running_rig, until
from support.chaos.rpc_fault_proxy import RpcFault
from support.chaos.steps import UNREACHABLE, DecodeStep, PrefillStep, Step
from support.chaos.tcp_fault_proxy import LinkFault
from support.chaos.zygote import Zygote
from support.tiny_models import make_tiny_model

TIMES = Times(lease_s=1.0, ticket_ttl_s=2.5, handshake_timeout_s=2.5, release_timeout_s=0.3)
CELL_DEADLINE_S = 60.0
SETTLE_TIMEOUT_S = 6.0
MAX_GROWTH = 16  # of descriptors, tasks or threads, over all cells that a worker lives through
RECUT_BLOCK_TOKENS = 16  # of the prefill worker, where KV is cut anew; the decode worker's are half as long
RECUT_STEPS: tuple[Step, ...] = (
    DecodeStep.TICKET_MINTED,
    DecodeStep.HALF_VERIFIED,
    DecodeStep.SEAL_RECEIVED,
    PrefillStep.MID_WRITE,
    PrefillStep.AFTER_FIRST_WRITE,
    PrefillStep.BEFORE_CLOSE,
    PrefillStep.BEFORE_REPLY,
)
METHODS = ("Handshake", "Run", "Generate")
UNFENCED = "shm"  # the link on which a decode worker is told that it cannot fence
UNFENCED_STEPS: tuple[Step, ...] = tuple(step for step in PrefillStep if step in WRITER_OPEN_STEPS)
STEPS: tuple[Step, ...] = (*DecodeStep, *PrefillStep)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    link_requests: int = 80
    transport_requests: int = 80
    rpc_requests: int = 24
    recut_requests: int = 40
    healthy_blocks: int = 102_400
    rigs_at_once: int = 3


@dataclass
class Report:
    cells: list[CellResult] = field(default_factory=list)
    healthy: dict[str, BulkResult] = field(default_factory=dict)
    unreachable: list[str] = field(default_factory=list)
    transports: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        found = [
            f"{cell.section} | {cell.row} | {cell.column} | {cell.policy}: {problem}"
            for cell in self.cells
            for problem in cell.problems
        ]
        for kind, moved in self.healthy.items():
            if moved.alarms or moved.wrong:
                found.append(f"healthy {kind}: {moved.alarms} alarms, {moved.wrong} wrong transfers; {moved.detail}")
        return found

    @property
    def totals(self) -> dict[str, int]:
        outcomes = [outcome for cell in self.cells for outcome in cell.outcomes]
        return {
            "cells": len(self.cells),
            "cells with a problem": sum(bool(cell.problems) for cell in self.cells),
            "requests sent into a fault's way": len(outcomes),
            "faulted requests": sum(cell.faulted for cell in self.cells),
            "ended in the oracle's tokens": sum(outcome.ending is Ending.EXACT for outcome in outcomes),
            "ended in one typed error": sum(outcome.ending is Ending.ERROR for outcome in outcomes),
            "wrong answers": sum(outcome.ending is Ending.WRONG for outcome in outcomes),
            "ended in something else, or not at all": sum(
                outcome.ending in (Ending.UNTYPED, Ending.HUNG) for outcome in outcomes
            ),
            "corrupted transfers": sum(cell.corruptions for cell in self.cells),
            "corrupted transfers that were used": sum(cell.undetected for cell in self.cells),
            "healthy block transfers": sum(moved.blocks for moved in self.healthy.values()),
            "false alarms": sum(cell.false_alarms for cell in self.cells) + sum(moved.alarms for moved in self.healthy.values()),
        }

    def markdown(self) -> str:
        slowest = max(self.cells, key=lambda cell: cell.seconds, default=None)
        lines = [
            "# The chaos matrix",
            "",
            "Written by `tests/chaos/run.py`; every cell is run on real worker processes over a tiny model. A cell says",
            "how the requests ended that the fault was meant for: `exact` = the tokens that an independent worker without",
            "any fault gave, otherwise the type of the one error that the client got. Policy `never`: the decode worker",
            "may not prefill, so that a failed hand-off must surface; `auto`: it may, so that the client must not notice.",
            "In every cell a later request over the same link, and one with the same prompt in the same cache partition,",
            "must be exact; every block, lease and request of every survivor must be given back; and no transfer may be",
            "used whose content was touched. **Bold** = a problem.",
            "",
            "## Totals",
            "",
            *_table(["what", "count"], [[name, f"{count:,}"] for name, count in self.totals.items()]),
            "",
        ]
        if slowest is not None:
            lines += [
                f"Slowest cell: {slowest.section}, {slowest.row}, {slowest.column}, {slowest.policy}: {slowest.seconds:.0f} s.",
                "",
            ]
        for kind, moved in self.healthy.items():
            lines.append(f"- Healthy over {kind}: {moved.blocks:,} block transfers, {moved.alarms} alarms, {moved.wrong} wrong.")
        lines += [f"- Not reached: {item}." for item in self.unreachable]
        lines += [
            "",
            "## Problems",
            "",
            *(f"- {problem}" for problem in self.problems),
            *([] if self.problems else ["None."]),
            "",
        ]
        for who, steps in (("decode", DecodeStep), ("prefill", PrefillStep)):
            columns = [f"{kind}: {signal_.value}" for kind in self.transports for signal_ in Signal]
            lines += [
                f"## A {who} worker is killed or stopped",
                "",
                "A cell: policy never / policy auto. SIGSTOP lasts longer than a lease.",
                "",
                *self._grid(who, [step.value for step in steps], columns, "step"),
                "",
            ]
        lines += [
            "## Faults on the data link (tcp, through a proxy that reads frames)",
            "",
            *self._policies("link", [fault.value for fault in LinkFault], ["tcp"]),
            "",
            "## Faults in a link's own work, and in the memory that it writes to",
            "",
            *self._policies("transport", [fault.value for fault in TransportFault], list(self.transports)),
            "",
            "## Control calls lost, doubled, late",
            "",
            *self._policies("rpc", list(dict.fromkeys(c.row for c in self.cells if c.section == "rpc")), list(self.transports)),
            "",
        ]
        lines += [
            "## The same where the prefill worker's blocks are twice as long, and KV is cut anew on its way",
            "",
            *self._policies(
                "recut", list(dict.fromkeys(c.row for c in self.cells if c.section == "recut")), list(self.transports)
            ),
            "",
            "## Where the decode worker cannot shut out a writer, and keeps its blocks until that has stopped",
            "",
            *self._policies("unfenced", list(dict.fromkeys(c.row for c in self.cells if c.section == "unfenced")), [UNFENCED]),
            "",
        ]
        return "\n".join(lines)

    def _grid(self, section: str, rows: Sequence[str], columns: Sequence[str], corner: str) -> list[str]:
        found = {(cell.row, cell.column, cell.policy): cell for cell in self.cells if cell.section == section}

        def text(row: str, column: str) -> str:
            parts = [_said(found.get((row, column, policy)), counted=False) for policy in Policy]
            return parts[0] if parts[0] == parts[1] else " / ".join(parts)

        return _table([corner, *columns], [[row, *(text(row, column) for column in columns)] for row in rows])

    def _policies(self, section: str, rows: Sequence[str], kinds: Sequence[str]) -> list[str]:
        found = {(cell.row, cell.column, cell.policy): cell for cell in self.cells if cell.section == section}
        columns = [(kind, policy) for kind in kinds for policy in Policy]
        return _table(
            ["fault", *(f"{kind}, {policy}" for kind, policy in columns)],
            [[row, *(_said(found.get((row, kind, policy)), counted=True) for kind, policy in columns)] for row in rows],
        )


def _said(cell: CellResult | None, *, counted: bool) -> str:
    if cell is None:
        return "–"
    endings: Counter[str] = cell.endings
    names = sorted(endings, key=lambda name: (name != Ending.EXACT.value, name))
    text = ", ".join(f"{endings[name]} {name}" if counted else name for name in names)
    if not cell.reached:
        text = "not reached"
    return f"**{text}**" if cell.problems else text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def installed_transports() -> tuple[str, ...]:
    """The links of this machine that two worker processes can use."""
    from kvtransfer.transports import LOSSY, TRANSPORTS

    kinds = [kind for kind in TRANSPORTS if kind not in ("inproc", "cuda_ipc", *LOSSY)]  # the workers' pools are in host memory
    if importlib.util.find_spec("nixl_cu13") is None:
        kinds = [kind for kind in kinds if kind != "nixl"]
    return tuple(kinds)


async def run(folder: Path, transports: Sequence[str], *, size: Size, say: Say, only: str = "") -> Report:
    """`folder` is for the model and the workers' log. `only` runs one section."""
    report = Report(transports=tuple(transports))
    started_s = time.monotonic()
    model_path = make_tiny_model(folder / "model", seed=5)
    zygote = Zygote(folder / "workers.log")
    try:
        oracle = await Oracle.start(zygote, model_path)
        try:
            campaign = _Campaign(zygote, oracle, model_path, report, size, say)
            for name, section in campaign.sections.items():
                if not only or name == only:
                    await section()
        finally:
            await oracle.close()
    finally:
        zygote.close()
    report.seconds = time.monotonic() - started_s
    return report


class _Campaign:
    def __init__(self, zygote: Zygote, oracle: Oracle, model_path: Path, report: Report, size: Size, say: Say) -> None:
        self._zygote, self._oracle, self._model_path = zygote, oracle, model_path
        self._report, self._size, self._say = report, size, say
        self.sections: dict[str, Callable[[], Awaitable[None]]] = {
            "processes": self.processes,
            "link": self.link,
            "transport": self.transport,
            "rpc": self.rpc,
            "recut": self.recut,
            "unfenced": self.unfenced,
            "healthy": self.healthy,
        }

    async def processes(self) -> None:
        """Rigs side by side: their workers mostly wait."""

        async def column(kind: str, policy: Policy) -> None:
            steps = [step for step in STEPS if step not in UNREACHABLE.get(kind, ())]
            cells: list[Callable[[Rig], Awaitable[CellResult]]] = [
                partial(_at_step, policy=policy, step=step, signal_=signal_, number=number)
                for number, (step, signal_) in enumerate(itertools.product(steps, Signal))
            ]
            await self._cells(kind, policy, cells, proxied=False)

        for kind in self._report.transports:
            self._report.unreachable += [f"{step.value!r} over {kind}" for step in UNREACHABLE.get(kind, ())]
        await self._side_by_side(column)

    async def link(self) -> None:
        for policy in Policy:
            cells = [
                partial(link_cell, policy=policy, fault=fault, count=self._size.link_requests, seed=seed)
                for seed, fault in enumerate(LinkFault)
            ]
            await self._cells("tcp", policy, cells, proxied=True)

    async def transport(self) -> None:
        for kind in self._report.transports:
            for policy in Policy:
                cells = [
                    partial(transport_cell, policy=policy, fault=fault, count=self._size.transport_requests, seed=seed)
                    for seed, fault in enumerate(faults_over(kind))
                ]
                await self._cells(kind, policy, cells, proxied=False)

    async def rpc(self) -> None:
        """Side by side as well: what is lost is waited for."""

        async def column(kind: str, policy: Policy) -> None:
            cells: list[Callable[[Rig], Awaitable[CellResult]]] = [
                partial(rpc_cell, policy=policy, method=method, fault=fault, count=self._size.rpc_requests, seed=seed)
                for seed, fault in enumerate(RpcFault)
                for method in METHODS
            ]
            if policy is Policy.AUTO:
                cells += [partial(info_cell, fault=fault) for fault in RpcFault]
            await self._cells(kind, policy, cells, proxied=True)

        await self._side_by_side(column)

    async def recut(self) -> None:
        async def column(kind: str, policy: Policy) -> None:
            cells = [
                _renamed(
                    partial(transport_cell, policy=policy, fault=fault, count=self._size.recut_requests, seed=seed),
                    "recut",
                    kind,
                    fault.value,
                )
                for seed, fault in enumerate(faults_over(kind, cut_anew=True))
            ]
            cells += [
                _renamed(
                    partial(_at_step, policy=policy, step=step, signal_=signal_, number=number),
                    "recut",
                    kind,
                    f"{'decode' if isinstance(step, DecodeStep) else 'prefill'}: {step.value}, {signal_.value}",
                )
                for number, (step, signal_) in enumerate(itertools.product(RECUT_STEPS, Signal))
            ]
            await self._cells(kind, policy, cells, proxied=False, prefill_block_tokens=RECUT_BLOCK_TOKENS)

        await self._side_by_side(column)

    async def unfenced(self) -> None:
        """Links between two host processes can all be fenced; that of two processes on one GPU cannot."""

        async def column(kind: str, policy: Policy) -> None:
            if kind != UNFENCED:
                return
            stopped = [
                _renamed(
                    partial(_at_step, policy=policy, step=step, signal_=signal_, number=number),
                    "unfenced",
                    kind,
                    f"prefill: {step.value}, {signal_.value}",
                )
                for number, (step, signal_) in enumerate(itertools.product(UNFENCED_STEPS, Signal))
            ]
            lost = [
                _renamed(
                    partial(rpc_cell, policy=policy, method="Release", fault=fault, count=self._size.rpc_requests, seed=seed),
                    "unfenced",
                    kind,
                    f"Release: {fault.value}",
                )
                for seed, fault in enumerate(RpcFault)
            ]
            await self._cells(kind, policy, stopped, proxied=False, fences=False)
            await self._cells(kind, policy, lost, proxied=True, fences=False)

        await self._side_by_side(column)

    async def healthy(self) -> None:
        for kind in self._report.transports:
            moved = await move_blocks(self._zygote, kind, self._size.healthy_blocks)
            self._report.healthy[kind] = moved
            self._say(f"healthy {kind}: {moved}")

    async def _side_by_side(self, column: Callable[[str, Policy], Awaitable[None]]) -> None:
        gate = asyncio.Semaphore(self._size.rigs_at_once)

        async def gated(kind: str, policy: Policy) -> None:
            async with gate:
                await column(kind, policy)

        await asyncio.gather(*(gated(kind, policy) for kind in self._report.transports for policy in Policy))

    async def _cells(
        self,
        kind: str,
        policy: Policy,
        cells: Sequence[Callable[[Rig], Awaitable[CellResult]]],
        *,
        proxied: bool,
        prefill_block_tokens: int | None = None,
        fences: bool = True,
    ) -> None:
        """One after the other on one rig; a cell that has gone wrong gets the next one a new rig."""
        left = list(cells)
        while left:
            async with running_rig(
                self._zygote,
                self._oracle,
                self._model_path,
                transport=kind,
                local_prefill=policy.value,
                times=TIMES,
                proxied=proxied,
                prefill_block_tokens=prefill_block_tokens,
                fences=fences,
            ) as rig:
                before: dict[tuple[int, str], int] = {}
                while left:
                    cell = await self._one(rig, kind, policy, left.pop(0))
                    self._report.cells.append(cell)
                    if not cell.problems:
                        before = await _check_growth(cell, rig, before)
                    self._say(
                        f"{cell.seconds:5.1f} s  {cell.section}: {cell.row}, {cell.column}, {cell.policy}: "
                        f"{dict(cell.endings)} {'; '.join(cell.problems[:3])}"
                    )
                    if cell.problems:
                        break

    async def _one(self, rig: Rig, kind: str, policy: Policy, make: Callable[[Rig], Awaitable[CellResult]]) -> CellResult:
        try:
            async with asyncio.timeout(CELL_DEADLINE_S):
                return await make(rig)
        except (TimeoutError, HandoffError, StartupError, OSError) as error:
            problem = f"the cell did not end: {type(error).__name__}: {error}"
            return CellResult("cell", "a cell that did not end", kind, policy, problems=[problem], seconds=CELL_DEADLINE_S)


def _renamed(
    make: Callable[[Rig], Awaitable[CellResult]], section: str, kind: str, what: str
) -> Callable[[Rig], Awaitable[CellResult]]:
    async def cell(rig: Rig) -> CellResult:
        made = await make(rig)
        made.section, made.row, made.column = section, what, kind
        return made

    return cell


async def _at_step(rig: Rig, policy: Policy, step: Step, signal_: Signal, number: int) -> CellResult:
    """Once more if it was not reached: a handshake may take too long on a busy machine, and nothing was done to anybody."""
    cell = await process_cell(rig, policy, step, signal_, number)
    return cell if cell.reached else await process_cell(rig, policy, step, signal_, number)


async def _check_growth(cell: CellResult, rig: Rig, before: dict[tuple[int, str], int]) -> dict[tuple[int, str], int]:
    """What a worker holds of descriptors, tasks and threads does not grow from cell to cell. Returns what to compare with."""
    after: dict[tuple[int, str], int] = {}

    async def settled() -> bool:
        nonlocal after
        after = await rig.footprint()
        return all(count - before.get(key, count) <= MAX_GROWTH for key, count in after.items())

    if not await until(settled, SETTLE_TIMEOUT_S):
        grown = {name: after[pid, name] - before.get((pid, name), after[pid, name]) for pid, name in after}
        cell.problems.append(f"more than after the first cell: {grown}")
    return {key: before.get(key, count) for key, count in after.items()}
