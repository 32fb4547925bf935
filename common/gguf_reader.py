"""The header of a GGUF file: typed metadata, and tensors that are mapped, not read.

Shared by the tokenizer (metadata only) and the weight loader (both). Parsing is the `gguf` library's; this adds types, errors
that name the key, and speed. Opening maps the file; tensor data is paged in when somebody touches it.

Importing this module imports numpy: modules that must stay light import it where they need it.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGUFReader, GGUFValueType

from common.errors import ModelLoadError

_Value = TypeVar("_Value", str, int, float, bool, list[Any])


_ARRAY_HEADER_BYTES = 12  # the type of its items, and their number
_LENGTH = struct.Struct("<Q")
_NATIVE_ORDER = "I"  # what the library calls a file in this machine's order of bytes


class _PlainArrayReader(GGUFReader):  # type: ignore[misc]  # the library ships no types
    """The library slices a memmap object for each of some 100,000 strings, and one for each number of an array: seconds for a
    vocabulary of 262,144 words. Here a string is a plain view of the same memory, and the numbers of an array are one."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """(bytes, parts, which of them are the value, types), as the library has it."""
        if raw_type != GGUFValueType.ARRAY or self.byte_order != _NATIVE_ORDER or sys.byteorder != "little":
            return super()._get_field_parts(orig_offs, raw_type)
        header = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        item, length = GGUFValueType(int(header[0][0])), int(header[1][0])
        scalar = self.gguf_scalar_to_np.get(item)
        start = orig_offs + _ARRAY_HEADER_BYTES
        if length == 0 or (scalar is None and item != GGUFValueType.STRING):
            return super()._get_field_parts(orig_offs, raw_type)
        if scalar is not None:
            values = self._get(start, scalar, length)
            if len(values) != length:
                raise ValueError("an array is cut short")
            return _ARRAY_HEADER_BYTES + values.nbytes, [*header, values], [len(header)], [GGUFValueType.ARRAY, item]
        parts, end = self._strings(start, length)
        places = list(range(len(header) + 1, len(header) + len(parts), 2))
        return end - orig_offs, [*header, *parts], places, [GGUFValueType.ARRAY, item]

    def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
        """Length and letters of each, in turn; and where they end."""
        data: Any = self._data
        buffer, size, place = memoryview(data), len(data), start
        parts: list[Any] = []
        for _ in range(count):
            letters = place + _LENGTH.size
            (length,) = _LENGTH.unpack_from(buffer, place)
            if letters + length > size:
                raise ValueError("a string is cut short")
            parts += data[place:letters], data[letters : letters + length]
            place = letters + length
        return parts, place


class GGUFFile:
    def __init__(self, path: Path) -> None:
        """Raises ModelLoadError if the file is missing, cut short or not GGUF."""
        self.path = path
        try:
            self._reader = _PlainArrayReader(path)
        except OSError as error:
            raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
            raise ModelLoadError(f"{path} is not a readable GGUF file: {error}") from error
        self.keys: tuple[str, ...] = tuple(self._reader.fields)
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}  # gguf.ReaderTensor

    def get(self, key: str, kind: type[_Value]) -> _Value | None:
        """The value of `key`, None if absent. Raises ModelLoadError if it is of another type."""
        value = self.contents(key)
        return None if value is None else self._typed(key, value, kind)

    def require(self, key: str, kind: type[_Value]) -> _Value:
        value = self.get(key, kind)
        if value is None:
            raise ModelLoadError(f"{self.path} lacks the key {key}", param=key)
        return value

    def array(self, key: str, kind: type[_Value]) -> list[_Value]:
        """The array at `key`, empty if absent."""
        values = self.contents(key)
        if values is None:
            return []
        return [self._typed(key, value, kind) for value in self._typed(key, values, list)]

    def contents(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            return None
        try:
            return field.contents()
        except (ValueError, IndexError) as error:
            raise ModelLoadError(f"{self.path}: {key} is unreadable: {error}", param=key) from error

    def _typed(self, key: str, value: Any, kind: type[_Value]) -> _Value:
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelLoadError(f"{self.path}: {key} must be of type {kind.__name__}, got {type(value).__name__}", param=key)
        return value
