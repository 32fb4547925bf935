"""A profile as tables: a row for each stage, its share as a bar, and how near it comes to what memory and arithmetic can do."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from common.engine.profile.watched import REST, StageProfile, StepProfile
from deploy.profiling.steps import Profiles

_BAR = 16


def draw_profiles(profiles: Profiles) -> Iterator[RenderableType]:
    limits = profiles.limits
    yield Text(
        f"{profiles.kernels}, {profiles.dtype}; at best this machine reads {limits.read_bytes_per_s / 1e9:.1f} GB/s"
        f" and computes {limits.operations_per_s / 1e9:.0f} GFLOP/s"
    )
    if profiles.decode is not None:
        yield _table("a decode step", profiles.decode)
    if profiles.prompt is not None:
        yield _table("a prompt's step", profiles.prompt)
    if profiles.beside:
        parts = ", ".join(f"{stage} {1e3 * seconds:.3f} ms" for stage, seconds in profiles.beside.items())
        yield Text(f"beside a decode step, in other threads and processes: {parts}")


def _table(title: str, profile: StepProfile) -> Table:
    table = Table(
        title=f"{title}: {profile.sequences:g} sequences, {profile.rows:g} tokens, {profile.tokens_in_kv:g} in KV;"
        f" mean of {profile.steps}",
        title_justify="left",
        show_footer=True,
    )
    table.add_column("stage", "all")
    table.add_column("ms", f"{1e3 * profile.seconds:.3f}", justify="right")
    table.add_column("share", "100.0 %", justify="right")
    table.add_column("", f"{100 * profile.accounted:.1f} % in stages", min_width=_BAR)
    table.add_column("MB read", justify="right")
    table.add_column("of memory", justify="right")
    table.add_column("GFLOP", justify="right")
    table.add_column("of peak", justify="right")
    for stage in profile.stages:
        table.add_row(*_row(stage), style="dim" if stage.stage == REST else None)
    return table


def _row(stage: StageProfile) -> tuple[str, ...]:
    reads, computes = stage.read_bytes > 0, stage.operations > 0
    return (
        stage.stage,
        f"{1e3 * stage.seconds:.3f}",
        f"{100 * stage.share:.1f} %",
        "#" * round(_BAR * stage.share),
        f"{stage.read_bytes / 1e6:.1f}" if reads else "",
        f"{100 * stage.share_of_bandwidth:.0f} %" if reads else "",
        f"{stage.operations / 1e9:.2f}" if computes else "",
        f"{100 * stage.share_of_peak:.0f} %" if computes else "",
    )
