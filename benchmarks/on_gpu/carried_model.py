"""A model in parts, for a machine that can be given no more than 64 MiB at a time, and reads no GGUF files.

    python -m benchmarks.on_gpu.carried_model pack model.gguf PARTS        here: part-0, part-1, ... of 48 MiB, and a manifest
    python -m benchmarks.on_gpu.carried_model unpack PARTS FOLDER          there: a folder that every engine loads

Parts may travel one after the other: what counts is that all lie in one folder when they are unpacked, and that they are what was
packed, which digests say. Weights in blocks travel as the file holds them and are unpacked to fp32, so they are the same weights
bit for bit. Unpacking needs torch and safetensors, as they come with transformers. For models of Llama's family.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.llama_config import llama_config
from common.engine.block_matrix import BlockKind, BlockMatrix, Weight
from common.engine.loader import load_stored_weights, load_weights
from common.errors import ModelLoadError

MANIFEST = "manifest.json"
PART_BYTES = 48 * 2**20


def pack(model: Path, parts: Path, part_bytes: int = PART_BYTES) -> int:
    """Returns how many parts there are. Raises ModelLoadError."""
    load = load_stored_weights if model.is_file() else load_weights
    architecture, weights = load(model, torch.float32)
    if architecture.family != "llama" or architecture.rope_scaling is not None or architecture.num_experts is not None:
        raise ModelLoadError("only models like Llama, without scaled rope and without experts, are packed", param="model")
    parts.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256()
    entries = []
    writer = _Parts(parts, part_bytes)
    for name, weight in weights.items():
        data = _bytes_of(weight)
        whole.update(data)
        entries.append({"name": name, "shape": list(weight.shape), "kind": _kind_of(weight), "bytes": len(data)})
        writer.write(data)
    digests = writer.close()
    manifest = {"config": llama_config(architecture), "tensors": entries, "sha256": whole.hexdigest(), "parts": digests}
    (parts / MANIFEST).write_text(json.dumps(manifest))
    return len(digests)


def unpack(parts: Path, folder: Path) -> None:
    """Raises ModelLoadError, naming the part that lacks or is not what was packed."""
    from safetensors.torch import save_file

    try:
        manifest: dict[str, Any] = json.loads((parts / MANIFEST).read_text())
        data = b"".join(_checked(parts / f"part-{index}", digest) for index, digest in enumerate(manifest["parts"]))
        config, entries, digest = manifest["config"], manifest["tensors"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{parts} holds no packed model: {error}", param="parts") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ModelLoadError(f"the parts in {parts} are not of one model", param="parts")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(_tensors(entries, data)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


class _Parts:
    """One file after the other, each full but the last."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self._folder = folder
        self._part_bytes = part_bytes
        self._waiting = bytearray()
        self._digests: list[str] = []

    def write(self, data: bytes) -> None:
        self._waiting += data
        while len(self._waiting) >= self._part_bytes:
            self._put(bytes(self._waiting[: self._part_bytes]))
            del self._waiting[: self._part_bytes]

    def close(self) -> list[str]:
        """The digests of all parts."""
        if self._waiting:
            self._put(bytes(self._waiting))
        return self._digests

    def _put(self, data: bytes) -> None:
        (self._folder / f"part-{len(self._digests)}").write_bytes(data)
        self._digests.append(hashlib.sha256(data).hexdigest())


def _checked(part: Path, digest: str) -> bytes:
    if not part.is_file():
        raise ModelLoadError(f"{part} is not there", param="parts")
    data = part.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ModelLoadError(f"{part} is not what was packed", param="parts")
    return data


def _kind_of(weight: Weight) -> str:
    return weight.kind.value if isinstance(weight, BlockMatrix) else "F32"


def _bytes_of(weight: Weight) -> bytes:
    tensor = weight.blocks if isinstance(weight, BlockMatrix) else weight.contiguous()
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensors(entries: list[Mapping[str, Any]], data: bytes) -> Iterator[tuple[str, torch.Tensor]]:
    memory, at = torch.frombuffer(bytearray(data), dtype=torch.uint8), 0
    for entry in entries:
        piece, shape = memory[at : at + entry["bytes"]], entry["shape"]
        at += entry["bytes"]
        if entry["kind"] == "F32":
            yield entry["name"], piece.clone().view(torch.float32).view(shape)
        else:
            blocks = piece.view(shape[0], -1)
            yield entry["name"], BlockMatrix(BlockKind(entry["kind"]), blocks, shape[1]).dequantised()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    if options.what == "pack":
        sys.stdout.write(f"{pack(options.source, options.target)} parts\n")
    else:
        unpack(options.source, options.target)


if __name__ == "__main__":
    main()
