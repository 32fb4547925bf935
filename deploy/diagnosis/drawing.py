"""How the doctor's findings look to a person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from deploy.commands.output import out
from deploy.diagnosis.finding import Finding, Severity

if TYPE_CHECKING:
    from deploy.diagnosis.links import LinkFinding

_MARKS = {Severity.OK: "green", Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.FAILURE: "bold red"}


def draw_findings(findings: Sequence[Finding], links: Sequence[LinkFinding], config: Path, *, running: bool) -> None:
    """By area, each with what it means and what to do; then the links, and the verdict."""
    area = ""
    width = max(len(finding.what) for finding in findings)
    indent = " " * (width + 13)
    for finding in findings:
        if finding.area != area:
            area = finding.area
            out.print(Text(area, style="bold"))
        line = Text(f"  {finding.severity.value:<8} ", style=_MARKS[finding.severity])
        line.append(f"{finding.what:<{width}}  ", style="default")
        line.append(finding.found, style="default")
        out.print(line, soft_wrap=True)
        for text, style in ((finding.means, "dim"), (f"-> {finding.advice}" if finding.advice else "", "default")):
            if text:
                out.print(Text(f"{indent}{text}", style=style), soft_wrap=True)
    if links:
        out.print(_links(links))
    if not running:
        out.print(Text("no cluster runs here: links between workers were not tried", style="dim"), soft_wrap=True)
    out.print(_verdict(findings, config))


def _links(links: Sequence[LinkFinding]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("prefill", "decode", "transport", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("latency ms", "MiB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what to do")
    for link in links:
        figures = (f"{link.latency_ms:.1f}", f"{link.mebibytes_per_s:,.0f}") if link.works else ("", "")
        table.add_row(link.prefill, link.decode, link.transport, _state(link), *figures, Text(link.advice))
    return table


def _state(link: LinkFinding) -> Text:
    if link.in_use:
        return Text("in use", style="green")
    if link.works:
        return Text("works")
    return Text("broken", style="red") if link.configured else Text("off", style="dim")


def _things(count: int) -> str:
    return "one thing stands" if count == 1 else f"{count} things stand"


def _verdict(findings: Sequence[Finding], path: Path) -> Text:
    counts = {severity: sum(finding.severity is severity for finding in findings) for severity in Severity}
    if counts[Severity.FAILURE]:
        return Text(f"{_things(counts[Severity.FAILURE])} in the way of serving {path}", style="bold red")
    if counts[Severity.WARNING]:
        return Text(f"it can serve; to mend: {counts[Severity.WARNING]}", style="yellow")
    return Text("fit to serve", style="green")
