"""From C++ source to a shared library in the cache, for whatever part of us has native code.

    source, flags, compiler, CPU -> name of the library -> there? take it : compile -> .unchecked -> check it, rename

The library is made for the CPU that compiles it, so the CPU's features are part of the name: a cache on a shared disk serves
different machines. One process at a time makes a library; the others wait for the lock and find the result. Whoever knows that a
library will be wanted, but cannot check it, may have it compiled ahead. Nothing is downloaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import EngineFailure

COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300.0
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class NativeSource:
    """What one library is compiled from. Every file in the folder counts."""

    name: str
    folder: Path
    main: str  # the file that is compiled; it includes the others
    flags: tuple[str, ...]

    def digest(self) -> str:
        found = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return found.hexdigest()


class BuildError(EngineFailure):
    """There will be no library: no compiler, or one that cannot compile it."""


def find_library(source: NativeSource, cache: Path) -> Path | None:
    """The library for this machine, if it was built before."""
    compiler = find_compiler()
    if compiler is None:
        return None
    path = cache / _name(source, compiler)
    return path if path.is_file() else None


def build_library(source: NativeSource, cache: Path, check: Callable[[Path], None]) -> Path:
    """The library for this machine; if need be it is compiled, which takes seconds, and taken only if `check` does not raise.

    Raises BuildError, and what `check` raises.
    """
    with _making(source, cache) as (compiler, path):
        if not path.is_file():
            unchecked = _compiled(source, compiler, path)
            try:
                check(unchecked)
                unchecked.replace(path)
            finally:
                unchecked.unlink(missing_ok=True)
    return path


def compile_ahead(source: NativeSource, cache: Path) -> None:
    """Does the long part of a `build_library` to come. Raises BuildError."""
    with _making(source, cache) as (compiler, path):
        if not path.is_file():
            _compiled(source, compiler, path)


@contextmanager
def _making(source: NativeSource, cache: Path) -> Iterator[tuple[str, Path]]:
    """The compiler, and the library's path, which is nobody else's to make meanwhile. Raises BuildError."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler: looked for {', '.join(COMPILERS)}")
    path = cache / _name(source, compiler)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{source.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield compiler, path
    except OSError as error:
        raise BuildError(f"cannot write to {cache}: {error.strerror}") from error


def _compiled(source: NativeSource, compiler: str, path: Path) -> Path:
    """The library, which nobody has checked. Under the lock of `_making`."""
    unchecked = path.with_suffix(".unchecked")
    if unchecked.is_file():
        return unchecked
    for left_behind in path.parent.glob(f"{source.name}.*{_UNFINISHED}"):  # by one who was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{source.name}.", suffix=_UNFINISHED, dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *source.flags, str(source.folder / source.main), "-o", str(made)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler} took longer than {_TIMEOUT_S:.0f} s") from error
        if done.returncode:
            raise BuildError(f"{compiler} failed: {_first_error(done.stderr)}")
        made.replace(unchecked)
    return unchecked


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines()
    return lines[0] if lines else "no message"


def find_compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def _name(source: NativeSource, compiler: str) -> str:
    digest = hashlib.sha256()
    for part in (*source.flags, compiler, _version(compiler), platform.machine(), _cpu_features(), source.digest()):
        digest.update(part.encode() + b"\0")
    return f"{source.name}-{digest.hexdigest()[:32]}.so"


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
