"""A block is `[layer][...]`, so a range of its layers is one range of bytes: `layer_bytes` for each.

Does not know how a layout came about, nor what the bytes mean. Which layouts go together is in `reshard`.
"""

from __future__ import annotations

from common.types import KVLayout


def layer_bytes(layout: KVLayout) -> int:
    return layout.block_bytes // layout.num_layers
