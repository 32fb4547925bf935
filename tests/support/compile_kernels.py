"""Compiles the kernels for sm_90 in the shapes of well-known models, and prints what each takes as lines of JSON.

    python -m support.compile_kernels [PART ...]        parts: those of `PARTS`; without, all

A process of its own, without Triton's interpreter: a kernel is either interpreted or compiled for as long as a process lives.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable

import torch

from common.engine.attention import Span
from common.engine.attention.paged import PagedAttention
from common.engine.kv_pool import KVPool
from common.engine.layers.rotary import RotaryEmbedding
from common.engine.triton_kernels import edit_logits, gated, log_sums, move_pieces, select
from common.engine.triton_kernels.add_norm import TritonNorm, add_norm
from common.engine.triton_kernels.turn_and_store import turn_and_store
from common.types import KVLayout
from support.triton_compiler import Launch, compile_launch, recorded_launches

CPU = torch.device("cpu")
# heads, KV heads, head_dim, window
LLAMA_8B, GEMMA_1B, SMOLLM2 = (32, 8, 128, 0), (4, 1, 256, 512), (9, 3, 64, 0)


def pool_of(kv_heads: int, head_dim: int, dtype: str) -> KVPool:
    return KVPool(KVLayout("m", "t", 2, kv_heads, head_dim, 16, dtype, exact=False), 3, CPU)


def attention(shape: tuple[int, int, int, int], dtype: str, *, exact: bool) -> None:
    heads, kv_heads, head_dim, window = shape
    pool = pool_of(kv_heads, head_dim, dtype)
    spans = [Span(0, 1, 4000), Span(1, 100, 0)]
    plan = PagedAttention(pool, heads, exact=exact).plan(torch.zeros(2, 256, dtype=torch.int64), spans)
    plan.attend(1, torch.empty(101, heads, head_dim, dtype=pool.tensor.dtype), window)


def rows() -> None:
    norm = TritonNorm(torch.empty(4096, dtype=torch.bfloat16), 1e-5, offset=False)
    hidden = torch.empty(8, 4096, dtype=torch.bfloat16)
    add_norm(hidden, hidden, norm)
    offset = TritonNorm(torch.empty(1152), 1e-6, offset=True)
    narrow = torch.empty(8, 1152, dtype=torch.bfloat16)
    add_norm(narrow, narrow, offset, offset)
    gated.gated_silu(torch.empty(8, 2 * 14336, dtype=torch.bfloat16))
    gated.gated_gelu(torch.empty(8, 2 * 6912, dtype=torch.bfloat16))


def heads() -> None:
    for (num_heads, kv_heads, head_dim, _), normed in ((LLAMA_8B, False), (GEMMA_1B, True)):
        pool = pool_of(kv_heads, head_dim, "bfloat16")
        norm = TritonNorm(torch.empty(head_dim), 1e-6, offset=True)
        angles = RotaryEmbedding(head_dim, 10_000.0, None, 64, CPU).angles(torch.arange(8))
        packed = torch.empty(8, num_heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16)
        index = pool.write_index(torch.arange(8))
        turn_and_store(packed, num_heads, angles, pool, 1, index, (norm, norm) if normed else None)


def draws() -> None:
    logits = torch.empty(2, 128_256)
    log_sums.log_sums(logits)
    select.draw_tokens(logits, torch.empty(2, 8, dtype=torch.int64), any_top_k=True, any_top_p=True)


def moves() -> None:
    words = torch.empty(4096, dtype=torch.int32)
    move_pieces.move_pieces(words, words, [(0, 16, 8192)])
    move_pieces.move_pieces(words, words, [(0, 4, 8192)])
    move_pieces.move_pieces(words, None, [(0, 0, 8192)])


def rules() -> None:
    places = torch.empty(9, dtype=torch.int64)
    logits = torch.empty(2, 128_256)
    edit_logits.apply_edits(logits, torch.empty(64, dtype=torch.int32), (9, 9, 9))
    words = torch.empty(2, 4008, dtype=torch.int32)
    edit_logits.mask_kernel[(2, 32)](logits, places, words, 128_256, 128_256, 4008, TOKENS=4096)


PARTS: dict[str, Callable[[], None]] = {
    "llama": lambda: attention(LLAMA_8B, "bfloat16", exact=False),
    "llama exact": lambda: attention(LLAMA_8B, "bfloat16", exact=True),
    "gemma": lambda: attention(GEMMA_1B, "bfloat16", exact=False),
    "gemma exact": lambda: attention(GEMMA_1B, "bfloat16", exact=True),
    "smollm2": lambda: attention(SMOLLM2, "bfloat16", exact=False),
    "float32": lambda: attention(LLAMA_8B, "float32", exact=False),
    "float32 exact": lambda: attention(LLAMA_8B, "float32", exact=True),
    "float32 wide": lambda: attention((4, 1, 256, 512), "float32", exact=False),
    "rows": rows,
    "heads": heads,
    "draws": draws,
    "rules": rules,
    "moves": moves,
}


def main(names: list[str]) -> None:
    for name in names or PARTS:
        with recorded_launches() as launches:
            PARTS[name]()
        seen: set[str] = set()
        for launch in launches:
            if name == "draws" and launch.arguments.get("PASS", 7) not in (0, 7):
                continue  # the passes between differ in a constant
            if (known := _identity(launch)) in seen:
                continue
            seen.add(known)
            compiled = compile_launch(launch)
            found = dataclasses.asdict(compiled) | {"part": name, "async_copies": compiled.ptx.count("cp.async.c")}
            del found["ptx"]
            sys.stdout.write(json.dumps(found | launch.options) + "\n")


def _identity(launch: Launch) -> str:
    constants = [launch.arguments[parameter.name] for parameter in launch.kernel.params if parameter.is_constexpr]
    return f"{launch.kernel.__name__} {constants} {launch.options}"


if __name__ == "__main__":
    main(sys.argv[1:])
