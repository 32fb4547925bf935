"""What a running cluster leaves for other commands to find it: one small file per cluster name, readable by its owner only.

    <home>/clusters/<name>.json    written by the launcher as soon as the manager can be asked, removed by it or by its janitor
    <home>/locks/<name>            locked for as long as the launcher or its janitor lives; the file itself stays

A state whose launcher is gone is stale and counts as absent; a pid that was given to another process is told apart by the time it
was started. The lock is what keeps two launchers of one name apart: a new one cannot begin before the old one is cleaned up.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.errors import ClusterError


@dataclass(frozen=True, slots=True)
class ClusterState:
    cluster: str
    cluster_id: str
    launcher_pid: int
    launcher_started: int  # clock ticks since boot, as the kernel tells it
    manager_address: str
    token: str = field(repr=False)
    janitor_pid: int = 0
    janitor_started: int = 0
    files: tuple[str, ...] = ()  # and folders, that go with the cluster
    config_path: str = ""

    @property
    def launcher_lives(self) -> bool:
        return started_at(self.launcher_pid) == self.launcher_started


def state_path(home: Path, cluster: str) -> Path:
    return home / "clusters" / f"{cluster}.json"


def started_at(pid: int) -> int | None:
    """When the process started; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def running_for_s(started: int) -> float:
    """How long ago a process was started that `started_at` tells so about."""
    uptime_s = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return max(0.0, uptime_s - started / os.sysconf("SC_CLK_TCK"))


def write_state(home: Path, state: ClusterState) -> None:
    path = state_path(home, state.cluster)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(state), file)
    draft.replace(path)


def read_state(home: Path, cluster: str) -> ClusterState | None:
    """None if no such cluster runs. Raises ClusterError for a file that is not ours."""
    state = _read(home, cluster)
    return state if state is not None and state.launcher_lives else None


def dead_state(home: Path, cluster: str) -> ClusterState | None:
    """Of a cluster whose launcher is gone, while nobody has removed its file."""
    state = _read(home, cluster)
    return None if state is None or state.launcher_lives else state


def running_state(home: Path, cluster: str) -> ClusterState:
    """Raises ClusterError if no such cluster runs."""
    state = read_state(home, cluster)
    if state is None:
        others = running_clusters(home)
        hint = f"what runs is: {', '.join(others)} (--cluster NAME)" if others else "start one with: pdserve up"
        raise ClusterError(f"no cluster {cluster!r} runs here; {hint}", param="cluster")
    return state


def running_clusters(home: Path) -> list[str]:
    """Names, in order. A state file that cannot be read is nobody's."""
    found = []
    for path in (home / "clusters").glob("*.json"):
        with suppress(ClusterError):
            if read_state(home, path.stem) is not None:
                found.append(path.stem)
    return sorted(found)


def wait_until_gone(home: Path, cluster: str, timeout_s: float) -> bool:
    """Waits for the launcher, then for its janitor; whether both ended, each within the time. True if nothing ran."""
    state = _read(home, cluster)
    if state is None:
        return True
    launcher = (state.launcher_pid, state.launcher_started)
    janitor = (state.janitor_pid, state.janitor_started)
    return all(_wait(pid, started, timeout_s) for pid, started in (launcher, janitor))


@contextmanager
def cluster_lock(home: Path, cluster: str, patience_s: float = 30.0) -> Iterator[int]:
    """The right to run the cluster of this name, as a descriptor that a child may inherit to keep it. Blocking while a dead
    launcher's janitor works. Raises ClusterError if somebody else has it."""
    path = home / "locks" / cluster
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _try_lock(descriptor):
            state = _read(home, cluster)
            if state is not None and state.launcher_lives:
                raise ClusterError(
                    f"a cluster {cluster!r} runs already (pid {state.launcher_pid}); end it with: pdserve down", param="cluster"
                )
            if state is None or not wait_until_gone(home, cluster, patience_s) or not _try_lock(descriptor):
                raise ClusterError(f"a cluster {cluster!r} is just starting or ending; try again in a moment", param="cluster")
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(pid: int, started: int, timeout_s: float) -> bool:
    try:
        descriptor = os.pidfd_open(pid) if pid > 0 else None
    except ProcessLookupError:
        return True
    if descriptor is None:
        return True
    try:
        if started_at(pid) != started:  # somebody else has the number by now
            return True
        ended, _, _ = select.select([descriptor], [], [], timeout_s)
        return bool(ended)
    finally:
        os.close(descriptor)


def _read(home: Path, cluster: str) -> ClusterState | None:
    path = state_path(home, cluster)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return ClusterState(**{**read, "files": tuple(read.get("files", ()))})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ClusterError(f"{path} cannot be read; remove it if no such cluster runs", param="cluster") from error
