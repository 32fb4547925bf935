"""What a cluster has on this machine while it runs, and what is left of it afterwards: processes, folders, shared memory, state.

    here = Belongings.of(cluster)  ...  the cluster ends  ...  here.left() == []

Processes are known by the home in their environment; the launcher's, Ray's and the workers' all have it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.cluster import RunningCluster

_RUN_FOLDER = re.compile(rb"/tmp/pd-[^/\0 ]+")
_SHARED = re.compile(rb"/dev/shm/[^\n]+?(?= \(deleted\)|\n)")


def processes_of(home: str) -> dict[int, str]:
    """Command lines by pid."""
    marker = f"PDSERVE_HOME={home}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
            except OSError:
                continue
    return found


@dataclass(frozen=True)
class Belongings:
    home: str
    pids: frozenset[int]
    files: frozenset[str]

    @classmethod
    def of(cls, cluster: RunningCluster) -> Belongings:
        home = cluster.environment["PDSERVE_HOME"]
        pids = frozenset(processes_of(home))
        files: set[bytes] = set()
        for pid in pids:
            try:
                files |= set(_RUN_FOLDER.findall(Path(f"/proc/{pid}/cmdline").read_bytes()))
                files |= set(_SHARED.findall(Path(f"/proc/{pid}/maps").read_bytes()))
            except OSError:
                continue
        return cls(home, pids, frozenset(file.decode() for file in files))

    def left(self) -> list[str]:
        left = [*processes_of(self.home).values(), *(str(path) for path in (Path(self.home) / "clusters").glob("*"))]
        return left + [file for file in self.files if Path(file).exists()]

    def listening_elsewhere(self) -> list[str]:
        """Addresses off loopback on which one of its processes listens."""
        inodes = set()
        for pid in self.pids:
            try:
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    target = os.readlink(link)
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
            except OSError:
                continue
        found = []
        for table, loopback in (
            ("tcp", ("0100007F",)),
            ("tcp6", ("00000000000000000000000001000000", "0000000000000000FFFF00000100007F")),
        ):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes and fields[1].split(":")[0] not in loopback:
                    found.append(f"{table} {fields[1]}")
        return found


def eventually(condition: Callable[[], bool], timeout_s: float = 90.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
