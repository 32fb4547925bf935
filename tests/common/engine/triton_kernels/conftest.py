"""Kernels run on the GPU where there is one, and in Triton's interpreter elsewhere (`tests/conftest.py` decides)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ON_GPU = Path("/dev/nvidiactl").exists()

pytest.importorskip("triton")


def call_device_function(function: Any, *args: Any, **named: Any) -> Any:
    return function.rewrite()(*args, **named)


if not ON_GPU:
    from triton.language import pointer_type
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction

    # A kernel has prepared Triton's language for the interpreter when it calls a device function, which would do it again: that
    # is most of the time that small kernels take.
    InterpretedFunction.__call__ = call_device_function
    # It makes a table of all types each time that it looks one up, which is a tenth of the rest.
    look_up = interpreter._get_np_dtype
    look_up_scalar = functools.cache(look_up)

    def look_up_once(kind: Any) -> Any:
        return look_up(kind) if isinstance(kind.scalar, pointer_type) else look_up_scalar(kind.scalar)

    interpreter._get_np_dtype = look_up_once


@pytest.fixture
def rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are numpy's, whose libraries compute some rows of a tile in another way than others, on some
    machines. A GPU does not: a row of a product is its own."""
    if ON_GPU:
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: object) -> Any:
        product = np.stack([np.matmul(row, b.data, dtype=d.data.dtype) for row in a.data])
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter computes with numpy, which warns of infinities that a GPU takes as they come."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN):RuntimeWarning"))
