"""Is there room on disk, and may it be written to: pdserve's home, and where Ray keeps its session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deploy.diagnosis.finding import Finding, Severity

_AREA = "storage"
_GIB = 2**30
_FEW_BYTES, _FEWEST_BYTES = 2 * _GIB, 256 * 2**20


def check_storage(home: Path, session: Path = Path("/tmp")) -> Iterator[Finding]:
    yield _room(home, "home", "models, logs and compiled kernels lie there", "free some, or point PDSERVE_HOME elsewhere")
    yield _room(session, "session folder", "Ray's session and its sockets lie there while a cluster runs", "free some")


def _room(folder: Path, what: str, means: str, advice: str) -> Finding:
    there = _nearest(folder)
    if not os.access(there, os.W_OK):
        return Finding(_AREA, what, f"{there} cannot be written to", Severity.FAILURE, means, f"chown or chmod {there}")
    free = shutil.disk_usage(there).free
    found = f"{folder}: {free / _GIB:.1f} GiB free"
    if free >= _FEW_BYTES:
        return Finding(_AREA, what, found)
    return Finding(_AREA, what, found, Severity.WARNING if free >= _FEWEST_BYTES else Severity.FAILURE, means, advice)


def _nearest(folder: Path) -> Path:
    """The folder, or the one above it that is there already."""
    return next(one for one in (folder, *folder.parents) if one.is_dir())
