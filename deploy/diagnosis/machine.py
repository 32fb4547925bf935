"""Is the machine fit: cores, memory and the limits on both, files, shared memory, pages, clock.

Reads what the kernel tells and changes nothing. The kernel's files are looked for under `root`, so that tests can bring a machine
of their own.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from deploy.diagnosis.finding import Finding, Severity

_AREA = "machine"
_FEWEST_FILES, _WANTED_FILES = 256, 4096
_LEAST_MEMORY_BYTES = 2**30
_RAY_STORE_BYTES = 100 * 2**20
_GIB = 2**30
_SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies")
_TIME_ERROR = 5  # adjtimex: the clock is not synchronised


def check_machine(root: Path = Path("/")) -> Iterator[Finding]:
    yield _cores(root)
    yield _memory(root)
    yield _open_files()
    yield _locked_memory()
    yield _shared_memory(root)
    yield _huge_pages(root)
    yield _clock()
    yield _clock_source(root)


def _cores(root: Path) -> Finding:
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    if quota is not None and quota < 0.95 * allowed:
        return Finding(
            _AREA,
            "cores",
            f"{allowed}, of which the control group gives {quota:g}",
            Severity.WARNING,
            "threads that compute on all cores are stopped again and again when the group's share is used up",
            f"set engine.threads so that all workers together have {max(1, int(quota))}",
        )
    few = allowed < 2
    means = "prefill and decode share one core, so a long prompt delays tokens" if few else ""
    return Finding(_AREA, "cores", str(allowed), Severity.NOTE if few else Severity.OK, means)


def _memory(root: Path) -> Finding:
    available, limit = _available_bytes(root), memory_room_bytes(root)
    free = available if limit is None else min(available, limit)
    found = f"{free / _GIB:.1f} GiB available"
    if limit is not None and limit < available:
        found += " within the control group's limit"
    if free >= _LEAST_MEMORY_BYTES:
        return Finding(_AREA, "memory", found)
    return Finding(
        _AREA,
        "memory",
        found,
        Severity.FAILURE,
        "each worker holds the weights and its KV pool in memory; without room the kernel kills it",
        "free some, or lower engine.kv_pool_tokens and the number of workers",
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else str(soft)
    if soft == resource.RLIM_INFINITY or soft >= _WANTED_FILES:
        return Finding(_AREA, "open files", found)
    advice = f"ulimit -n {_WANTED_FILES} before `pdserve up`"
    if hard != resource.RLIM_INFINITY and hard < _WANTED_FILES:
        advice += f" (the hard limit, {hard}, has to be raised first: limits.conf, or LimitNOFILE of the unit)"
    severity = Severity.WARNING if soft >= _FEWEST_FILES else Severity.FAILURE
    return Finding(
        _AREA, "open files", found, severity, "each client, worker and KV link takes one; beyond it connections fail", advice
    )


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(_AREA, "locked memory", "no limit")
    return Finding(
        _AREA,
        "locked memory",
        f"{soft / 2**20:.0f} MiB",
        Severity.NOTE,
        "only transport nixl over RDMA needs to lock the KV pool; shm and tcp do not",
    )


def _shared_memory(root: Path) -> Finding:
    try:
        os.close(os.memfd_create("pdserve-doctor", os.MFD_CLOEXEC))
    except OSError as error:
        return Finding(
            _AREA,
            "shared memory",
            f"refused: {error.strerror}",
            Severity.WARNING,
            "workers of one host cannot hand KV over through memory",
            "allow memfd_create, or set transfer.transports: [tcp]",
        )
    folder = root / "dev/shm"
    if not folder.is_dir():
        return Finding(
            _AREA, "shared memory", "no /dev/shm", Severity.NOTE, "Ray puts its object store on disk; nothing of ours lives there"
        )
    size = shutil.disk_usage(folder).total
    found = f"works; /dev/shm has {size / _GIB:.1f} GiB"
    if size < _RAY_STORE_BYTES:
        return Finding(
            _AREA,
            "shared memory",
            f"works; /dev/shm has {size / 2**20:.0f} MiB",
            Severity.NOTE,
            "too small for Ray's object store, which then lies on disk; nothing of ours lives there",
            "of a container: --shm-size 256m",
        )
    return Finding(_AREA, "shared memory", found)


def _huge_pages(root: Path) -> Finding:
    text = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    mode = text.partition("[")[2].partition("]")[0]
    if not mode:
        return Finding(_AREA, "huge pages", "unknown", Severity.NOTE, "the kernel does not tell")
    if mode == "never":
        return Finding(
            _AREA,
            "huge pages",
            "never",
            Severity.NOTE,
            "weights and KV pool lie in pages of 4 KiB, which costs a CPU some of its speed",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Finding(_AREA, "huge pages", mode)


def _clock() -> Finding:
    synchronised = clock_is_synchronised()
    if synchronised is None:
        return Finding(_AREA, "clock", "unknown whether it is synchronised", Severity.NOTE, "the kernel does not tell")
    if synchronised:
        return Finding(_AREA, "clock", "synchronised")
    return Finding(
        _AREA,
        "clock",
        "not synchronised",
        Severity.NOTE,
        "on one machine it does not matter; with several, logs and traces do not line up",
        "run chrony or systemd-timesyncd",
    )


def _clock_source(root: Path) -> Finding:
    source = _read(root / "sys/devices/system/clocksource/clocksource0/current_clocksource")
    if source in _SLOW_CLOCKS:
        return Finding(
            _AREA,
            "clock source",
            source,
            Severity.NOTE,
            "reading the time takes microseconds, and it is read for every token",
            "a kernel or hypervisor with tsc or kvm-clock",
        )
    return Finding(_AREA, "clock source", source or "unknown")


def clock_is_synchronised() -> bool | None:
    """What NTP's part of the kernel says; None if it may not be asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    # struct timex, all zero: nothing is to be changed. It takes 208 bytes on 64 bits.
    state = libc.adjtimex(ctypes.create_string_buffer(512))
    return None if state < 0 else state != _TIME_ERROR


def cpu_quota(root: Path) -> float | None:
    """Cores that the control group may use, of this group and all above it; None without a limit."""
    quotas = []
    for folder in _groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota and quota != "max":
            quotas.append(int(quota) / int(period or 100_000))
        old_quota = _read(folder / "cpu.cfs_quota_us")
        if old_quota and int(old_quota) > 0:
            quotas.append(int(old_quota) / int(_read(folder / "cpu.cfs_period_us") or 100_000))
    return min(quotas, default=None)


def memory_room_bytes(root: Path) -> int | None:
    """What the control group, or one above it, leaves; None without a limit."""
    rooms = []
    for folder in _groups(root, "memory"):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit = _read(folder / most)
            if limit.isdigit() and int(limit) < 2**60:  # the older interface writes "no limit" as a huge number
                rooms.append(max(0, int(limit) - int(_read(folder / used) or 0)))
    return min(rooms, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those above it."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controllers if controllers else mount
        if controllers and not base.is_dir():
            base = mount / controller
        inside = base / path.lstrip("/")
        yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(base))


def _available_bytes(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
