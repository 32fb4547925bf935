"""The log folders of a cluster: one per run, so that a crash can be looked into after the next start.

    <home>/logs/<cluster>/<UTC time>-<id>/    run.json and one file per process; made by `pdserve up`, which also removes those
                                              of runs that are too many

A run is going on for as long as its launcher lives.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from common.errors import ClusterError
from common.log_files import SUFFIX
from deploy.cluster_state import started_at

_ABOUT = "run.json"


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path
    launcher_pid: int
    launcher_started: int  # clock ticks since boot

    @property
    def lives(self) -> bool:
        return self.launcher_pid > 0 and started_at(self.launcher_pid) == self.launcher_started

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.name.endswith(SUFFIX))


def logs_of(home: Path, cluster: str) -> Path:
    return home / "logs" / cluster


def begin_run(home: Path, cluster: str, cluster_id: str, *, keep: int) -> Path:
    """The folder of a new run of this process, and the end of the oldest ones. `keep` counts the new one. Raises ClusterError."""
    above = logs_of(home, cluster)
    folder = above / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{cluster_id[:8]}"
    about = {"launcher_pid": os.getpid(), "launcher_started": started_at(os.getpid()) or 0}
    try:
        folder.mkdir(parents=True, mode=0o700)
        (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
    except OSError as error:
        raise ClusterError(f"cannot keep logs in {above}: {error.strerror}", param="logging") from error
    for run in runs_of(home, cluster)[:-keep]:
        if not run.lives:
            shutil.rmtree(run.folder, ignore_errors=True)
    return folder


def runs_of(home: Path, cluster: str) -> list[Run]:
    """All that are kept, the last one at the end."""
    above = logs_of(home, cluster)
    return [_read(folder) for folder in sorted(above.iterdir()) if folder.is_dir()] if above.is_dir() else []


def clusters_with_logs(home: Path) -> list[str]:
    above = home / "logs"
    return sorted(folder.name for folder in above.iterdir() if folder.is_dir()) if above.is_dir() else []


def run_in(folder: Path) -> Run:
    """A folder that the configuration named. Raises ClusterError if it is none."""
    if not folder.is_dir():
        raise ClusterError(f"there is no folder {folder}", param="folder")
    return _read(folder)


def _read(folder: Path) -> Run:
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        return Run(folder, int(about["launcher_pid"]), int(about["launcher_started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Run(folder, 0, 0)
