"""The file of keys: lines of a tenant and an entry. It may change while a router runs, to give keys and to take them back.

    entries() -> changed() ... changed() -> entries()

A file is new when its identity, time or size is: who replaces it by renaming is always seen. It knows no tenant and no caller.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.api_keys import KeyEntry, parse_entry
from common.errors import ConfigError
from router.admission.tenants import DEFAULT

_PARAM = "router.keys_file"


class KeysFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None

    def changed(self) -> bool:
        """Whether the file is another one than `entries` read; False while there is none."""
        try:
            return _identity(os.stat(self._path)) != self._seen
        except OSError:
            return False

    def entries(self) -> list[tuple[KeyEntry, str]]:
        """Each with its tenant's name, "" for a tenant of its own. Blank lines and # comments are skipped. Raises ConfigError."""
        try:
            with self._path.open("rb") as file:
                self._seen = _identity(os.fstat(file.fileno()))
                lines = file.read().decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the keys file {self._path}: {error}", param=_PARAM) from error
        found = []
        for number, line in enumerate(lines, start=1):
            words = line.split("#", 1)[0].split()
            if not words:
                continue
            try:
                name, text = words
                if not text.startswith(("sha256:", "scrypt:")):
                    raise ValueError("keys are not kept in the clear here")
                found.append((parse_entry(text), name if name != DEFAULT else ""))
            except ValueError as error:
                raise ConfigError(
                    f"{self._path}:{number}: wants a tenant and the entry of a key, as `pdserve keys new` prints them ({error})",
                    param=_PARAM,
                ) from error
        return found


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
