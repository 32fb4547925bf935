"""Runs spin: a model with its macros -> a verifier -> the verdict of a search, and the events of the trail if there is one.

Each run has a directory of its own, which the caller gives. Does not know what the model says.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

RUN_TIMEOUT_S = 900.0
MAX_DEPTH_STEPS = 10_000
MAX_MEMORY_MB = 3000


@dataclass(frozen=True, slots=True)
class Search:
    """What an exhaustive search found."""

    errors: int
    complaint: str  # of the first error: the assertion that failed, or what kind of cycle there is
    states: int
    is_whole: bool  # nothing was left out, for depth or memory
    dead_code: tuple[str, ...]  # statements that no run reaches
    events: tuple[tuple[str, ...], ...]  # what the model prints on the way to the error


def missing_tool() -> str | None:
    """What a search needs and this machine does not have."""
    return next((tool for tool in ("spin", "gcc") if shutil.which(tool) is None), None)


def search(model: Path, where: Path, *macros: str, claim: bool = False, optimize: int = 0) -> Search:
    """Searches every reachable state. `claim`: for cycles that break the model's LTL claim as well. `optimize`: how well the
    verifier is compiled; a second at 0, two at 1, seven at 2, so that only long searches are worth more."""
    definitions = [f"-D{macro}" for macro in macros]
    _run(["spin", *definitions, "-a", str(model)], where)
    kind = [] if claim else ["-DSAFETY"]
    _run(["gcc", f"-O{optimize}", "-w", f"-DMEMLIM={MAX_MEMORY_MB}", *kind, "-o", "pan", "pan.c"], where)
    output = _run(["./pan", f"-m{MAX_DEPTH_STEPS}", *(["-a"] if claim else [])], where)
    errors = int(_found(r"errors: (\d+)", output))
    complaint = _found(r"pan:\d+: (.*) \(at depth", output) if errors else ""
    trail = _run(["spin", *definitions, "-t", "-T", "-k", f"{model.name}.trail", str(model)], where) if errors else ""
    return Search(
        errors=errors,
        complaint=complaint,
        states=int(float(_found(r"([\d.e+]+) states, stored", output))),
        is_whole="Search not completed" not in output and "max search depth too small" not in output,
        dead_code=tuple(line.strip() for line in re.findall(r"^\t\S+:\d+, state \d+, .*$", output, re.MULTILINE)),
        events=tuple(tuple(line.split()) for line in trail.splitlines() if re.fullmatch(r" *[a-z_]+( \d+)+", line)),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise AssertionError(f"the verifier did not say {pattern!r}:\n{text}")
    return match.group(1)


def _run(command: list[str], where: Path) -> str:
    done = subprocess.run(
        command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_TIMEOUT_S, check=False
    )
    if done.returncode != 0 and command[0] != "./pan":
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout
