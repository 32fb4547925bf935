"""The decoder's C++ source, and how it is compiled (`common.native_build`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common import native_build
from common.native_build import COMPILERS, BuildError, NativeSource, find_compiler

__all__ = ["COMPILERS", "BuildError", "build_library", "compile_ahead", "find_compiler", "find_library", "source_digest"]

_SOURCE = Path(__file__).parent / "source"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # a multiply-add is one where the source says so: no tile shape rounds otherwise
    "-fno-math-errno",
    "-fno-strict-aliasing",  # pairs of bf16 are read as words
    "-fPIC",
    "-shared",
    "-pthread",
)


def find_library(cache: Path) -> Path | None:
    """The library for this machine, if it was built before."""
    return native_build.find_library(_source(), cache)


def build_library(cache: Path, check: Callable[[Path], None]) -> Path:
    """The library for this machine; if need be it is compiled, which takes seconds, and taken only if `check` does not raise.

    Raises BuildError, and what `check` raises.
    """
    return native_build.build_library(_source(), cache, check)


def compile_ahead(cache: Path) -> None:
    """The long part of a `build_library` to come, for one who has no torch to check it against. Raises BuildError."""
    native_build.compile_ahead(_source(), cache)


def source_digest() -> str:
    """Of what is compiled."""
    return _source().digest()[:32]


def _source() -> NativeSource:
    return NativeSource("decoder", _SOURCE, "decoder.cpp", _FLAGS)
