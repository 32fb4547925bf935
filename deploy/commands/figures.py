"""Figures as people read them: short, with their units."""

from __future__ import annotations

UNKNOWN = "-"


def span(seconds: float | None) -> str:
    """How long something has been going on: 45 s, 12 m, 3 h 12 m, 5 d 3 h."""
    if seconds is None:
        return UNKNOWN
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} m"
    return f"{minutes} m" if minutes else f"{int(seconds)} s"


def short_time(seconds: float | None) -> str:
    """Of a request or a step: 850 us, 12.3 ms, 480 ms, 2.41 s."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1.0:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


def rate(per_s: float | None) -> str:
    """Of events: 0, 0.42, 8.3, 512, 12.3k."""
    if per_s is None:
        return UNKNOWN
    if per_s < 0.005:
        return "0"
    if per_s >= 10_000:
        return f"{per_s / 1000:.1f}k"
    return f"{per_s:.2f}" if per_s < 1 else f"{per_s:.1f}" if per_s < 100 else f"{per_s:.0f}"


def share(part: float | None) -> str:
    return UNKNOWN if part is None else f"{part:.0%}" if part >= 0.01 or part == 0 else "<1%"


def size(number_bytes: float | None) -> str:
    if number_bytes is None:
        return UNKNOWN
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number_bytes >= scale:
            return f"{number_bytes / scale:.1f} {unit}"
    return f"{number_bytes:.0f} B"


def degree(tensor_parallel: int, pipeline_parallel: int) -> str:
    """Of a worker's processes: TP 2, PP 3, TP 2 x PP 3; nothing for a single one."""
    parts = [f"{name} {number}" for name, number in (("TP", tensor_parallel), ("PP", pipeline_parallel)) if number > 1]
    return " x ".join(parts)
