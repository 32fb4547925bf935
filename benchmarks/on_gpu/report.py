"""Figures of a block: what was measured, beside the roof or the figure that it is held against."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Roof:
    """What this card does at best, measured just now."""

    copy_bytes_per_s: float  # read and written bytes together
    flops_per_s: float  # of a large product in 16 bits

    @property
    def payload_bytes_per_s(self) -> float:
        """Of a copy on the device: each byte is read and written."""
        return self.copy_bytes_per_s / 2


@dataclass(frozen=True)
class Figure:
    check: str  # K1 ...
    what: str
    value: float
    unit: str
    fraction: float | None = None  # of what is named next
    of: str = ""
    target: float | None = None  # of the fraction if there is one, else of the value
    lower_is_better: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        judged = self.value if self.fraction is None else self.fraction
        return judged <= self.target if self.lower_is_better else judged >= self.target


@dataclass
class Report:
    block: str
    device: str
    roof: Roof = field(default_factory=lambda: Roof(1.0, 1.0))
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    grid: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, *figures: Figure) -> None:
        for figure in figures:
            if self.device == "cpu":
                figure = replace(figure, target=None)  # they are a GPU's
            self.figures.append(figure)
            print(line_of(figure), flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"note: {text}", flush=True)

    def as_json(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.device == "cuda" else platform.processor() or platform.machine()
        return {
            "block": self.block,
            "device": name,
            "torch": torch.__version__,
            "roof": asdict(self.roof),
            "figures": [asdict(figure) | {"met": figure.met} for figure in self.figures],
            "notes": self.notes,
            "grid": self.grid,
            "seconds": self.seconds,
        }


def line_of(figure: Figure) -> str:
    fraction = "" if figure.fraction is None else f"{figure.fraction:8.3f} of {figure.of}"
    verdict = {None: "", True: "met", False: "missed"}[figure.met]
    target = "" if figure.target is None else f"target {'<=' if figure.lower_is_better else '>='} {figure.target:g} {verdict}"
    return f"{figure.check:3} {figure.what:58} {figure.value:12.4g} {figure.unit:8} {fraction:44} {target}"


def show(report: Report) -> None:
    roof = report.roof
    print(f"\n{report.block} on {report.device}, {report.seconds:.0f} s")
    print(f"roof: copy {roof.copy_bytes_per_s / 1e12:.3f} TB/s, product in 16 bits {roof.flops_per_s / 1e12:.1f} TFLOP/s")
    for figure in report.figures:
        print(line_of(figure))
    for note in report.notes:
        print(f"note: {note}")
