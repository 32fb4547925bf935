"""Vectors of texts, kept from run to run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from router.semantic.embedder import Embedder, Vector
from router.semantic.reading import Reading


class KeptVectors:
    """An embedder that remembers: policies and seeds ask for the same texts. `file` keeps them for the next run."""

    def __init__(self, embedder: Embedder, file: Path | None) -> None:
        self._embedder = embedder
        self._file = file
        self._vectors: dict[str, Vector] = {}  # by digest of the text
        if file is not None and file.is_file():
            with np.load(file, allow_pickle=False) as kept:
                self._vectors = dict(zip(kept["digests"].tolist(), kept["vectors"].astype(np.float32), strict=True))
        self._loaded = len(self._vectors)

    @property
    def revision(self) -> str:
        return self._embedder.revision

    @property
    def dimensions(self) -> int:
        return self._embedder.dimensions

    @property
    def quick(self) -> bool:
        return self._embedder.quick

    def embed(self, text: str, reading: Reading) -> Vector:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        vector = self._vectors.get(digest)
        if vector is None:
            vector = self._vectors[digest] = self._embedder.embed(text, reading)
        return vector

    def save(self) -> None:
        if self._file is not None and len(self._vectors) > self._loaded:
            vectors = np.array(list(self._vectors.values()), np.float16)
            np.savez(self._file, digests=np.array(list(self._vectors)), vectors=vectors)
