"""May two workers exchange blocks? Only if every field of their layouts is equal; a refusal names the first that differs.

A block is `[layer][...]`, so a range of its layers is one range of bytes: `layer_bytes` for each.

Does not know how a layout came about, nor what the bytes mean.
"""

from __future__ import annotations

from dataclasses import fields

from common.errors import HandshakeRefused
from common.types import KVLayout


def check_compatible(ours: KVLayout, theirs: KVLayout) -> None:
    """Called by the prefill worker when a decode worker introduces itself. Raises HandshakeRefused with the field as `param`."""
    for field in fields(KVLayout):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other:
            raise HandshakeRefused(f"{field.name} differs: {mine!r} here, {other!r} at the peer", param=field.name)


def layer_bytes(layout: KVLayout) -> int:
    return layout.block_bytes // layout.num_layers
