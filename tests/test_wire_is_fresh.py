"""common/wire holds exactly what the pinned protoc makes of proto/. `make proto` mends it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_generator_is_the_pinned_one() -> None:
    pinned = re.search(r"^grpcio-tools==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert importlib.metadata.version("grpcio-tools") == pinned[1], "`make install-dev` installs the pinned version"


def test_regenerated_code_is_what_is_checked_in(tmp_path: Path) -> None:
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "proto").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Icommon/wire=proto"]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *outputs, *sources], cwd=ROOT, check=True, timeout=60)
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "common/wire").iterdir()}
    held = {
        path.name: path.read_bytes() for path in (ROOT / "common/wire").iterdir() if path.is_file() and path.name != "__init__.py"
    }
    assert fresh.keys() == held.keys()
    assert [name for name in fresh if fresh[name] != held[name]] == [], "run `make proto`"
    assert len(fresh) == 3 * len(sources) > 0
