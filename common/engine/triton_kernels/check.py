"""Holds the kernels against torch on small made-up inputs, on the device that they are to serve on, before anything is served.

A compiler that miscompiles, a device on which a kernel does not fit, or a driver that does not go with this Triton shows here, in
the dtype and with the heads of the model that is about to be served. Takes as long as compiling does: seconds.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from common.engine.attention import AttentionBackend, Span
from common.engine.attention.paged import PagedAttention
from common.engine.attention.reference import ReferenceAttention
from common.engine.batch import SampleSpec
from common.engine.kv_pool import KVPool
from common.engine.layers.rotary import RotaryEmbedding
from common.engine.loader import ModelArchitecture
from common.engine.sampler import sample as on_host
from common.engine.token_rules import Bias, Penalties, RowRules
from common.engine.triton_kernels import gated, sampler
from common.engine.triton_kernels.add_norm import TritonNorm, add_norm, add_norm_reference
from common.engine.triton_kernels.turn_and_store import turn_and_store, turn_and_store_reference
from common.errors import EngineFailure
from common.types import KVLayout

_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Of values with a spread of about one. In fp32 a GPU may multiply in fewer bits."""
_SPANS = (Span(0, 20, 3), Span(20, 1, 35), Span(21, 1, 0))


def check_kernels(architecture: ModelArchitecture, layout: KVLayout, device: torch.device, *, exact: bool) -> None:
    """Raises EngineFailure if a kernel does not compute what torch computes; what Triton raises, it raises."""
    generator = torch.Generator().manual_seed(0)
    small = dataclasses.replace(layout, num_layers=1)
    pool = KVPool(small, 12, device)
    dtype, heads, width = pool.tensor.dtype, architecture.num_heads, 2 * architecture.head_dim

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    rows = sum(span.num_rows for span in _SPANS)
    norm = TritonNorm(random(width), 1e-6, offset=False)
    ours, theirs, added = random(rows, width), None, random(rows, width)
    theirs = ours.clone()
    _compare("add_norm", add_norm(ours, added, norm), add_norm_reference(theirs, added, norm), dtype)
    gate_up = random(rows, 2 * width)
    _compare("gated_silu", gated.gated_silu(gate_up), gated.gated_silu_reference(gate_up), dtype)
    _compare("gated_gelu", gated.gated_gelu(gate_up), gated.gated_gelu_reference(gate_up), dtype)

    blocks_each = -(-48 // layout.block_tokens)
    tables = torch.arange(3 * blocks_each, device=device).view(3, -1) % 11 + 1  # sequences may share blocks here
    pool.tensor[1:] = random(*pool.tensor[1:].shape)
    packed = random(rows, heads + 2 * layout.num_kv_heads, layout.head_dim)
    rotary = RotaryEmbedding(layout.head_dim, 10_000.0, None, 64, device)
    angles = rotary.angles(torch.arange(rows, device=device))
    write_index = pool.write_index(torch.arange(rows, device=device) + layout.block_tokens)
    expected = turn_and_store_reference(packed, heads, angles, pool, 0, write_index)
    stored = pool.tensor.clone()
    pool.tensor[1:3] = 0
    queries = turn_and_store(packed, heads, angles, pool, 0, write_index)
    _compare("turn_and_store", queries, expected, dtype)
    written = pool.rows[write_index.view(-1)]
    pool.tensor.copy_(stored)
    _compare("turn_and_store", written, pool.rows[write_index.view(-1)], dtype)

    backend: AttentionBackend = PagedAttention(pool, heads, exact=exact)
    reference = ReferenceAttention(pool, heads)
    for window in sorted({0, *(8 for layer_window in architecture.layer_windows if layer_window)}):
        attended = backend.plan(tables, _SPANS).attend(0, queries, window)
        _compare("attention", attended, reference.plan(tables, _SPANS).attend(0, queries, window), dtype)

    logits = torch.randn(2, 300, generator=generator).to(device) * 3
    best = logits.argmax(dim=1).cpu().numpy()
    rules = RowRules(
        Bias(best[:1], np.array([-9.0], dtype=np.float32)),
        Penalties(best[1:], np.array([2.0], dtype=np.float32), 1.5, 0.5, 0.5),
        banned_token_ids=np.arange(100, 150),
    )
    ruled = SampleSpec(4, 5, 0, 0.0, 0, 1.0, 0.0, None, rules)
    specs = [SampleSpec(3, 5, 0, 0.0, 0, 1.0, 0.0, 2), SampleSpec(9, 5, 1, 0.8, 40, 0.9, 0.01, None), ruled, ruled]
    drawn_from = [0, 1, 0, 1]
    drawn, wanted = sampler.sample(logits, specs, drawn_from), on_host(logits.cpu(), specs, drawn_from)
    if [token.token_id for token in drawn] != [token.token_id for token in wanted]:
        raise EngineFailure("the kernels draw other tokens than the host")


def _compare(what: str, got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    furthest = float((got.float() - expected.float()).abs().max())
    if not furthest <= _TOLERANCE[dtype]:
        raise EngineFailure(f"the kernel {what} is {furthest:.2g} off in {dtype}")
