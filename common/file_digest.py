"""The sha256 of files, remembered: hashing 100 MB at every start of a worker, or 100 GB, is time that nobody gets back.

A `DigestBook` is a small JSON file `{name: {size_bytes, mtime_ns, sha256}}`. An entry counts while size and mtime fit. The book
is a cache that may be lost or unwritable; the files are the truth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileDigest:
    size_bytes: int
    mtime_ns: int
    sha256: str


class DigestBook:
    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, FileDigest]:
        """The entries by file name; none if there is no readable book. They may be out of date."""
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
            return {
                str(name): FileDigest(int(entry["size_bytes"]), int(entry["mtime_ns"]), str(entry["sha256"]))
                for name, entry in entries.items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    def digests(self, files: Sequence[Path]) -> dict[str, str]:
        """The sha256 of each file by its name: from the book where the entry fits, else hashed and written down."""
        known = self.read()
        current = {file.name: _measure(file, known.get(file.name)) for file in files}
        if not current.items() <= known.items():
            self._write({**known, **current})
        return {name: entry.sha256 for name, entry in current.items()}

    def _write(self, entries: dict[str, FileDigest]) -> None:
        table = {
            name: {"size_bytes": entry.size_bytes, "mtime_ns": entry.mtime_ns, "sha256": entry.sha256}
            for name, entry in entries.items()
        }
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Readers in other processes see the old book or the new one, never half of it.
            descriptor, draft = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(table, file, indent=1)
            os.replace(draft, self.path)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _measure(file: Path, known: FileDigest | None) -> FileDigest:
    status = file.stat()
    if known is not None and (known.size_bytes, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return known
    return FileDigest(status.st_size, status.st_mtime_ns, sha256_of(file))
