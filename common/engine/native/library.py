"""The C interface of the compiled decoder: structures as `source/decoder.cpp` declares them, and calls that raise.

Pointers are plain addresses: whoever fills a structure keeps alive what it points to. Calls block without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from common.engine.native.build import source_digest
from common.errors import EngineFailure

_INTERFACE = 8
_OUT_OF_MEMORY = 1
ATTENTION, FEED_FORWARD = 1, 2
"""Halves of a layer."""
STAGES = ("embed", "norm", "qkv", "rope, write", "attention", "output", "gate, up", "down", "head")
"""What a step's time is divided into, in the order of `source/stages.h`. Norm is all norms together."""


class Matrix(ctypes.Structure):
    _fields_ = (("panels", ctypes.c_void_p), ("held", ctypes.c_int64))


class LayerWeights(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("qkv", Matrix),
        ("qkv_bias", ctypes.c_void_p),
        ("output", Matrix),
        ("output_bias", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("gate_up", Matrix),
        ("down", Matrix),
    )


class Description(ctypes.Structure):
    _fields_ = (
        ("bytes_per_value", ctypes.c_int64),
        ("kv_bits", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("ffn_size", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("num_positions", ctypes.c_int64),
        ("block_tokens", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("norm_epsilon", ctypes.c_double),
        ("embedding", Matrix),
        ("layers", ctypes.POINTER(LayerWeights)),
        ("final_norm", ctypes.c_void_p),
        ("head", Matrix),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("table_width", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("first_rows", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("first_layer", ctypes.c_int64),
        ("end_layer", ctypes.c_int64),
        ("embeds", ctypes.c_int64),
        ("halves", ctypes.c_int64),
        ("partial", ctypes.c_void_p),
    )


class Limits(ctypes.Structure):
    """What the machine can do at best; operations are two per product."""

    _fields_ = (
        ("read_bytes_per_s", ctypes.c_double),
        ("operations_per_s", ctypes.c_double),
        ("rounded_operations_per_s", ctypes.c_double),
    )


class Library:
    def __init__(self, path: Path) -> None:
        """Raises EngineFailure if this is not the library that belongs to this file."""
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            self._library.pdserve_interface.restype = ctypes.c_int64
            interface = self._library.pdserve_interface()
            self._library.pdserve_arithmetic.restype = ctypes.c_int64
            instructions = self._library.pdserve_arithmetic()
        except (OSError, AttributeError) as error:
            raise EngineFailure(f"{path} cannot be loaded: {error}") from error
        if interface != _INTERFACE:
            raise EngineFailure(f"{path} has interface {interface}, not {_INTERFACE}")
        self.arithmetic = f"native {source_digest()} {instructions:x}"
        """Two libraries for which this is the same give the same bits."""
        self._create = self._library.pdserve_decoder_create
        self._create.argtypes, self._create.restype = [ctypes.POINTER(Description)], ctypes.c_void_p
        self._destroy = self._library.pdserve_decoder_destroy
        self._destroy.argtypes, self._destroy.restype = [ctypes.c_void_p], None
        self._use_threads = self._library.pdserve_decoder_use_threads
        self._use_threads.argtypes, self._use_threads.restype = [ctypes.c_void_p, ctypes.c_int64], None
        self._forward = self._library.pdserve_decoder_forward
        self._forward.argtypes, self._forward.restype = [ctypes.c_void_p, ctypes.POINTER(Step)], ctypes.c_int
        self._logits = self._library.pdserve_decoder_logits
        self._logits.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._logits.restype = ctypes.c_int
        self._pick = self._library.pdserve_decoder_pick
        self._pick.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
        self._pick.restype = ctypes.c_int
        self._watch = self._library.pdserve_decoder_watch
        self._watch.argtypes, self._watch.restype = [ctypes.c_void_p, ctypes.c_void_p], None
        self._limits = self._library.pdserve_decoder_limits
        self._limits.argtypes, self._limits.restype = [ctypes.c_void_p, ctypes.POINTER(Limits)], ctypes.c_int

    def create(self, description: Description) -> int:
        handle = self._create(ctypes.byref(description))
        if not handle:
            raise EngineFailure("no memory for the native decoder")
        return int(handle)

    def destroy(self, handle: int) -> None:
        self._destroy(handle)

    def use_threads(self, handle: int, wanted: int) -> None:
        """In the calls to come, of those that it was made with. No result depends on it."""
        self._use_threads(handle, wanted)

    def forward(self, handle: int, step: Step) -> None:
        _check(self._forward(handle, ctypes.byref(step)))

    def logits(self, handle: int, hidden: int, num_rows: int, to: int) -> None:
        _check(self._logits(handle, hidden, num_rows, to))

    def pick(self, handle: int, hidden: int, may_come: Sequence[int | None]) -> Sequence[int]:
        """The best token of each row, -1 where there is none. `may_come` are addresses of bits, one per token of the head."""
        num_rows = len(may_come)
        found = (ctypes.c_int64 * num_rows)()
        _check(self._pick(handle, hidden, num_rows, (ctypes.c_void_p * num_rows)(*may_come), found))
        return found[:]

    def watch(self, handle: int, seconds: int | None) -> None:
        """Has the seconds of each stage added to so many doubles at that address from now on; None ends it."""
        self._watch(handle, seconds)

    def limits(self, handle: int) -> Limits:
        """Takes a moment."""
        found = Limits()
        _check(self._limits(handle, ctypes.byref(found)))
        return found


def _check(outcome: int) -> None:
    if outcome == _OUT_OF_MEMORY:
        raise EngineFailure("no memory for this step in the native decoder")
    if outcome:
        raise EngineFailure("a step names tokens, positions or blocks that the model or the pool does not have")
