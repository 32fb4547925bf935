"""A compiler that is missing, slow, broken or wrong, played by a shell script; what it gives out, the real one made before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def install_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Makes a shell script the only compiler there is: it sees the real one as $REAL, and each library leaves a line."""
    real = shutil.which("g++")
    tools = folder / "tools"
    tools.mkdir(parents=True)
    for name in ("sh", "sed", "cp", "rm", "as", "ld", "mkdir"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    compiler = tools / "g++"
    lines = (
        "#!/bin/sh",
        f"REAL={real}",
        'test "$1" = --version && exec $REAL --version',
        f"echo call >> {folder}/calls",
        script,
    )
    compiler.write_text("\n".join(lines) + "\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    return folder / "calls"


def gives_out(library: Path) -> str:
    """A compiler that has it ready."""
    return f'while test "$1" != -o; do shift; done; exec cp {library} "$2"'
