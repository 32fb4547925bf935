"""A GPU's multiprocessors divided between two engines of one process: green contexts of the driver, a stream on each.

    all multiprocessors --split--> so many for one | the rest for the other --> a context each --> a stream each, for torch

A green context is a share of the one context that a process has on its GPU: memory, code and handles are common, and what is
launched on its stream runs on its multiprocessors only. Nothing of the card is set. The division is made by the driver through
ctypes, for torch's own green contexts each take the first multiprocessors of the card, and two of them overlap.

It helps within a process alone. Two processes take turns on a GPU, or a server (MPS) joins them, and that has shares of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from common.errors import StartupError

GRANULE = 8
"""On Hopper multiprocessors are given out by eights."""
_SM_RESOURCE = 1
_DEFAULT_STREAM = 1  # the only flag there is, and obligatory
_NON_BLOCKING = 1
_FUNCTIONS = (
    "cuInit",
    "cuDeviceGet",
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxStreamCreate",
)


class Resource(ctypes.Structure):
    """144 bytes by the driver's interface, of which one number is of interest."""

    _fields_ = [
        ("kind", ctypes.c_int),
        ("internal", ctypes.c_ubyte * 92),
        ("multiprocessors", ctypes.c_uint),
        ("rest", ctypes.c_ubyte * 44),
    ]


class Library(Protocol):
    """libcuda, as ctypes shows it: functions by their names, which return 0 or the number of an error."""

    def __getattr__(self, name: str) -> Any: ...


def load_driver() -> Library:
    """Raises StartupError where there is none that knows green contexts."""
    try:
        library: Library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise StartupError(f"no driver for green contexts: {error}", param="sharing") from error
    missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise StartupError(f"the driver is too old for green contexts: it has no {missing[0]}", param="sharing")
    return library


def multiprocessors_for(share: float, total: int) -> int:
    """The nearest number to a share that can be given out, leaving some to the other. Raises StartupError if none can."""
    if total < 2 * GRANULE:
        raise StartupError(f"{total} multiprocessors cannot be divided", param="sharing")
    return max(GRANULE, min(round(share * total / GRANULE) * GRANULE, (total - GRANULE) // GRANULE * GRANULE))


def divided_streams(library: Library, share: float, device: int, priorities: Sequence[int]) -> list[tuple[int, int]]:
    """Two streams: that of the engine with `share` of the multiprocessors, and that of the one with the rest. The address of
    each, and how many it has. They live as long as the process. Raises StartupError."""
    ordinal = ctypes.c_int()
    everything, first, rest = Resource(), Resource(), Resource()
    groups = ctypes.c_uint(1)
    _call(library, "cuInit", ctypes.c_uint(0))
    _call(library, "cuDeviceGet", ctypes.byref(ordinal), ctypes.c_int(device))
    _call(library, "cuDeviceGetDevResource", ordinal, ctypes.byref(everything), ctypes.c_int(_SM_RESOURCE))
    wanted = multiprocessors_for(share, everything.multiprocessors)
    _call(
        library,
        "cuDevSmResourceSplitByCount",
        ctypes.byref(first),
        ctypes.byref(groups),
        ctypes.byref(everything),
        ctypes.byref(rest),
        ctypes.c_uint(0),
        ctypes.c_uint(wanted),
    )
    streams = []
    for part, priority in zip((first, rest), priorities, strict=True):
        if not part.multiprocessors:
            raise StartupError(f"of {everything.multiprocessors} multiprocessors {wanted} leave none", param="sharing")
        description, context, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        _call(library, "cuDevResourceGenerateDesc", ctypes.byref(description), ctypes.byref(part), ctypes.c_uint(1))
        _call(library, "cuGreenCtxCreate", ctypes.byref(context), description, ordinal, ctypes.c_uint(_DEFAULT_STREAM))
        flags = ctypes.c_uint(_NON_BLOCKING)
        _call(library, "cuGreenCtxStreamCreate", ctypes.byref(stream), context, flags, ctypes.c_int(priority))
        streams.append((int(stream.value or 0), int(part.multiprocessors)))
    return streams


def on_stream(address: int) -> AbstractContextManager[object]:
    """What a thread is in whose work goes to that stream."""
    stream: AbstractContextManager[object] = torch.cuda.stream(torch.cuda.ExternalStream(address))
    return stream


def _call(library: Library, function: str, *arguments: Any) -> None:
    code = getattr(library, function)(*arguments)
    if code:
        raise StartupError(f"{function} failed with error {code} of the driver", param="sharing")
