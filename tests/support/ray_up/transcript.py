"""What a run of `make test-cluster` saw, line by line, as a file that stays."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


class Transcript:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.outcome = "It did not come to its end."
        self._lines: list[str] = []
        self._started_s = time.monotonic()

    def say(self, text: str) -> None:
        line = f"- {time.monotonic() - self._started_s:6.1f} s  {text}"
        self._lines.append(line)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def write(self) -> None:
        head = (
            "# `ray up` on four hosts\n\n"
            "Written by `make test-cluster` (tests/hosts/test_ray_up.py). The hosts are network, PID, mount, UTS and IPC"
            f" namespaces of one machine with {os.cpu_count()} cores; while other programs run on"
            " it, times are longer.\nA model of random weights in exact mode; three clients"
            " stream without pause, and every answer is compared with that of an aggregated run.\n\n"
        )
        self._path.write_text(head + "\n".join(self._lines) + f"\n\n{self.outcome}\n", encoding="utf-8")
