from __future__ import annotations

from common.types import KVLayout
from kvtransfer.layout import layer_bytes

LAYOUT = KVLayout("model", "tokenizer", 30, 3, 64, 16, "bfloat16", True)


def test_a_layer_holds_keys_and_values_of_all_heads() -> None:
    assert layer_bytes(LAYOUT) == 3 * 2 * 16 * 64 * 2
    assert layer_bytes(LAYOUT) * 30 == LAYOUT.block_bytes
