from __future__ import annotations

from dataclasses import fields, replace

import pytest

from common.errors import HandshakeRefused
from common.types import KVLayout
from kvtransfer.layout import check_compatible, layer_bytes

LAYOUT = KVLayout("model", "tokenizer", 30, 3, 64, 16, "bfloat16", True)


def test_equal_layouts_are_compatible() -> None:
    check_compatible(LAYOUT, replace(LAYOUT))


@pytest.mark.parametrize("field", [field.name for field in fields(KVLayout)])
def test_a_difference_is_refused_by_name(field: str) -> None:
    value = getattr(LAYOUT, field)
    other = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value + "x"
    with pytest.raises(HandshakeRefused) as refused:
        check_compatible(LAYOUT, replace(LAYOUT, **{field: other}))
    assert refused.value.param == field


def test_a_layer_holds_keys_and_values_of_all_heads() -> None:
    assert layer_bytes(LAYOUT) == 3 * 2 * 16 * 64 * 2
    assert layer_bytes(LAYOUT) * 30 == LAYOUT.block_bytes
