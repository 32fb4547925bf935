"""Sums of bytes that a GPU makes while it copies them: the first level of a digest of KV that never was in host memory.

    bytes   |  chunk of 4 KiB  |  chunk  | chunk, padded with zeros |
    sums    |  4 x 64 bits     |  4 x 64 |  4 x 64                  |        1/128 of the bytes; what is made of them:
    `kvtransfer.digest`

A chunk is 1,024 little-endian words m of 32 bits. Lane t of it is NH, of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC:
Fast and Secure Message Authentication, CRYPTO 1999), with the key k moved on by two words a lane (their Toeplitz construction):

    lane t = sum over i of  (m[2i] + k[2i + 2t] mod 2^32) * (m[2i+1] + k[2i+1 + 2t] mod 2^32)   mod 2^64

For a key at random two different chunks agree in all four lanes with a probability of at most 2^-128 (in one: 2^-32). The key
here is fixed and public: the bound is about bytes that know nothing of it, flipped, torn or swapped ones, and not about a
forger's. Additions have no order, so any number of threads may share them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

CHUNK_WORDS = 1024
CHUNK_BYTES = 4 * CHUNK_WORDS
LANES = 4
KEY: npt.NDArray[np.uint32] = np.frombuffer(
    hashlib.shake_256(b"pdserve-kv-lanes-1").digest(4 * (CHUNK_WORDS + 2 * (LANES - 1))), dtype="<u4"
)

Sums = npt.NDArray[np.uint64]


def num_chunks(num_bytes: int) -> int:
    return -(-num_bytes // CHUNK_BYTES)


def lane_sums(content: memoryview) -> Sums:
    """[chunks, 4]: what the kernel's sums are held against."""
    whole = content.nbytes // CHUNK_BYTES
    flat = np.frombuffer(content, dtype=np.uint8)
    sums = np.empty((num_chunks(content.nbytes), LANES), dtype=np.uint64)
    _sum_chunks(flat[: whole * CHUNK_BYTES].view("<u4").reshape(whole, CHUNK_WORDS), sums[:whole])
    if whole < len(sums):
        last = np.zeros(CHUNK_BYTES, dtype=np.uint8)
        last[: flat.size - whole * CHUNK_BYTES] = flat[whole * CHUNK_BYTES :]
        _sum_chunks(last.view("<u4").reshape(1, CHUNK_WORDS), sums[whole:])
    return sums


def _sum_chunks(words: npt.NDArray[np.uint32], sums: Sums) -> None:
    for lane in range(LANES):
        key = KEY[2 * lane : 2 * lane + CHUNK_WORDS]
        keyed = (words + key).astype(np.uint64)
        np.sum(keyed[:, 0::2] * keyed[:, 1::2], axis=1, out=sums[:, lane])
