"""How a picture looks: models, workers, routers, events, in as many columns and lines as the terminal has.

At 80 columns everything fits that says how the cluster is; wider terminals get more. What has no room at the bottom is left out,
least interesting first: old events, then workers that are well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deploy.commands.cluster_drawing import STYLES
from deploy.commands.figures import UNKNOWN, degree, rate, share, short_time, size, span
from deploy.top.picture import EventRow, ModelRow, Picture, RouterRow, WorkerRow

_WIDE, _WIDER = 104, 132
_FEWEST_EVENTS, _MOST_EVENTS = 4, 40
_BAR_CELLS = 8
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BAD_EVENTS = ("lost", "killed", "given_up")
_GOOD_EVENTS = ("ready", "restarted")


@dataclass(frozen=True, slots=True)
class Frame:
    """What there is to draw on. `height` None: as much as it takes."""

    width: int
    height: int | None
    hint: str = ""  # on the first line, such as the keys


def draw(picture: Picture, frame: Frame, *, away: str = "") -> RenderableType:
    """`away` says why the cluster cannot be seen any more; the picture is then the last one."""
    head: list[RenderableType] = [_heading(picture, frame)]
    if away:
        head.append(Text(f"{away}; this is how it was, trying again", style="bold red"))
    models, routers = _models(picture.models, frame), _routers(picture.routers, frame)
    workers, room = list(picture.workers), len(picture.workers)
    events: Sequence[EventRow] = picture.events[-_MOST_EVENTS:] if frame.height is not None else picture.events[-10:]
    if frame.height is not None:
        fixed = len(head) + 3 + 1 + len(picture.models) + 1 + len(picture.routers) + 1  # lines, headers, gaps
        left = frame.height - fixed
        wanted_events = min(_FEWEST_EVENTS, len(events))
        room = max(1, min(len(workers), left - wanted_events - 1))
        events = events[len(events) - max(0, min(len(events), left - room - 2)) :]
    hidden = len(workers) - room
    shown = [worker for worker in workers if worker in sorted(workers, key=_interest)[:room]] if hidden > 0 else workers
    parts: list[RenderableType] = [*head, Text(), models, Text(), _workers(shown, frame)]
    if hidden > 0:
        parts.append(Text(f"and {hidden} more that are well; a higher terminal shows them", style="dim"))
    parts += [Text(), routers]
    if events:
        parts += [Text(), *(_event(event, picture.at_s) for event in events)]
    return Group(*parts)


def draw_absent(message: str, frame: Frame) -> RenderableType:
    """Before anything was seen."""
    return Group(Text("pdserve top", style="bold").append(f"  {frame.hint}", "dim"), Text(), Text(message, style="yellow"))


def _heading(picture: Picture, frame: Frame) -> Text:
    line = Text("pdserve top", style="bold", no_wrap=True, overflow="ellipsis")
    line.append(f"  cluster {picture.cluster}, up {span(picture.up_s)}", style="default")
    line.append(f"  {datetime.fromtimestamp(picture.at_s).astimezone().strftime('%H:%M:%S')}", style="default")
    line.append(f"  {frame.hint}", style="dim")
    return line


def _table(frame: Frame, *columns: tuple[str, bool]) -> Table:
    """A column is its name, and whether it holds figures."""
    gap = 2 if frame.width >= _WIDE else 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold cyan", collapse_padding=True)
    for name, figures in columns:
        table.add_column(name, justify="right" if figures else "left", no_wrap=True, overflow="ellipsis")
    return table


def _models(models: Sequence[ModelRow], frame: Frame) -> Table:
    columns = [("MODEL", False), ("P", True), ("D", True), ("REQ/S", True), ("ERR/S", True), ("RUN", True), ("WAIT", True)]
    columns += [("TOK/S", True), ("TTFT", True), ("TPOT", True), ("CACHE", True)]
    wide, wider = frame.width >= _WIDE, frame.width >= _WIDER
    if wide:
        columns[9:9] = [("P99", True)]
        columns[11:11] = [("P99", True)]
    promises = any(model.promises_met is not None for model in models)
    if wider or promises:
        columns.append(("SLO", True))
    table = _table(frame, *columns)
    for model in models:
        row: list[Text | str] = [
            model.name,
            _pool(model.prefill_ready, model.prefill_desired),
            _pool(model.decode_ready, model.decode_desired),
            rate(model.requests_per_s),
            Text(rate(model.failures_per_s), style="red" if model.failures_per_s else "default"),
            str(model.in_flight),
            _waiting(model.queued),
            rate(model.tokens_per_s),
            short_time(model.ttft.p50_s),
        ]
        row += [short_time(model.ttft.p99_s)] if wide else []
        row += [short_time(model.tpot.p50_s)]
        row += [short_time(model.tpot.p99_s)] if wide else []
        row += [share(model.cache_hits)]
        if wider or promises:
            row.append(share(model.promises_met))
        table.add_row(*row)
    return table


def _workers(workers: Sequence[WorkerRow], frame: Frame) -> Table:
    wide, wider = frame.width >= _WIDE, frame.width >= _WIDER
    columns = [("WORKER", False), ("STATE", False), ("RUN", True), ("WAIT", True), ("TOK/S", True), ("STEP", True)]
    columns += [("KV", False), ("LINK", False)]
    if wide:
        columns += [("PREFIX", True), ("MOVED/S", True)]
    if wider:
        columns += [("BROKEN", True), ("PREEMPTED", True), ("START", True)]
    groups = any(_degree(worker) for worker in workers)
    if groups:
        columns[1:1] = [("RANKS", False)]
    table = _table(frame, *columns)
    for worker in workers:
        row: list[Text | str] = [
            worker.worker_id,
            *([_degree(worker) or "1"] if groups else []),
            Text(worker.state, style=STYLES.get(worker.state, "default")),
            str(worker.running),
            _waiting(worker.waiting),
            rate(worker.tokens_per_s),
            short_time(worker.step_p50_s),
            _bar(worker.kv_used),
            _link(worker),
        ]
        if wide:
            row += [share(worker.prefix_hits), size(worker.transfer_bytes_per_s)]
        if wider:
            row += [_bad(worker.transfer_failures), _bad(worker.preemptions), str(worker.incarnation)]
        table.add_row(*row)
    return table


def _routers(routers: Sequence[RouterRow], frame: Frame) -> Table:
    columns = [("ROUTER", False), ("REQ/S", True), ("TOK/S", True), ("RUN", True), ("GOOD/S", True), ("RETRY", True)]
    table = _table(frame, *columns, ("MOVED", True), ("STORE", False))
    for router in routers:
        name = Text(f"http://{router.http_address}")
        if not router.answers:
            name.append("  does not answer", style="red")
        table.add_row(
            name,
            rate(router.requests_per_s),
            rate(router.tokens_per_s),
            str(router.in_flight),
            rate(router.goodput_per_s),
            _bad(router.retries),
            _bad(router.migrations),
            Text(router.store or "own", style="red" if router.store not in ("", "closed") else "default"),
        )
    return table


def _event(event: EventRow, now_s: float) -> Text:
    at = datetime.fromtimestamp(event.at_s).astimezone()
    today = datetime.fromtimestamp(now_s).astimezone().date()
    style = "red" if event.kind in _BAD_EVENTS else "green" if event.kind in _GOOD_EVENTS else "default"
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(at.strftime("%H:%M:%S" if at.date() == today else "%m-%d %H:%M:%S"), style="dim")
    line.append(f"  {event.kind:<9}", style=style)
    line.append(f" {event.worker_id or event.model}", style="default")
    line.append(f"  {event.text}", style="dim")
    return line


def _interest(worker: WorkerRow) -> tuple[bool, bool, int]:
    """The smaller, the more somebody wants to see it."""
    return worker.state == "ready", worker.answers, -(worker.running + worker.waiting)


def _degree(worker: WorkerRow) -> str:
    return degree(worker.tensor_parallel, worker.pipeline_parallel)


def _pool(ready: int, desired: int) -> Text:
    return Text(f"{ready}/{desired}", style="default" if ready == desired else "yellow")


def _waiting(count: int) -> Text:
    return Text(str(count), style="yellow" if count else "default")


def _bad(count: int) -> Text:
    return Text(str(count), style="yellow" if count else "dim")


def _bar(used: float | None) -> Text:
    if used is None:
        return Text(UNKNOWN)
    eighths = round(min(1.0, used) * _BAR_CELLS * 8)
    full, rest = divmod(eighths, 8)
    cells = "█" * full + (_EIGHTHS[rest] if rest else "")
    style = "red" if used > 0.95 else "yellow" if used > 0.8 else "green"
    text = Text(cells.ljust(_BAR_CELLS), style=style)
    text.append(f" {share(used):>4}", style="default")
    return text


def _link(worker: WorkerRow) -> Text:
    text = Text(worker.transport or UNKNOWN)
    if worker.transfer_failures:
        text.append(f" !{worker.transfer_failures}", style="red")
    return text
