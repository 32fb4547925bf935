"""Which host this is, for two processes to find out whether they share one.

A host here is where one can reach the other's abstract sockets: a kernel as it was booted, and a network namespace of it. Two
containers of one pod are one host; two containers with networks of their own are two.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def this_host() -> str:
    """Without a slash. Equal in two processes if, and only if, they are on one host."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    network = os.stat("/proc/self/ns/net").st_ino
    return f"{boot}.{network}"
