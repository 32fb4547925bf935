"""Import path is file path: our names resolve to this repository, nobody else owns them, and the small installs stay small."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from common.heads_store import SHIPPED_FOR

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "kvtransfer", "prefill_worker", "decode_worker", "router", "deploy")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TOP_LEVEL = {
    ".ci",
    ".gitattributes",
    ".gitignore",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "proto",
    "pyproject.toml",
    "tests",
    *PACKAGES,
}


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_is_ours(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve() == ROOT / name / "__init__.py", "another distribution shadows this package"
    assert set(importlib.metadata.packages_distributions().get(name, ["pdserve"])) == {"pdserve"}


def test_the_wheel_holds_the_packages_and_nothing_else() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["hatch"]["build"]["targets"]["wheel"]["packages"] == list(PACKAGES)


def test_the_page_of_the_console_is_in_the_wheel_with_all_that_it_loads() -> None:
    """A wheel holds what is in a package's folder and not ignored."""
    folder = ROOT / "router" / "console" / "static"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    text = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    loaded = {name for name in re.findall(r'(?:href|src)="/console/([^"]+)"', text["index.html"])}
    for name in [name for name in files if name.endswith(".js") and not name.startswith("vendor/")]:
        loaded |= set(re.findall(r'from "\./([^"]+)"', text[name]))
        assert not re.findall(r"""["'`(](?:https?:)?//""", text[name].replace("http://www.w3.org/2000/svg", "")), name
    licences = {name for name in files if name.endswith("LICENSE.txt")}
    assert licences == {"vendor/uPlot.LICENSE.txt"}
    assert loaded | licences | {"index.html"} == set(files), "a file is missing, or nobody loads it"
    if (ROOT / ".git").exists():
        names = [str(path.relative_to(ROOT)) for path in files.values()]
        done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout == ""


def test_heads_that_come_with_us_are_in_the_wheel_each_for_a_model() -> None:
    names = [f"common/shipped_heads/{name}" for name in SHIPPED_FOR.values()]
    found = [path.relative_to(ROOT).as_posix() for path in (ROOT / "common" / "shipped_heads").iterdir()]
    assert sorted(found) == sorted(names), "a file is missing, or nobody loads it"
    assert sum((ROOT / name).stat().st_size for name in names) < 8 * 2**20
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout == ""
        done = subprocess.run(["git", "check-attr", "diff", *names], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.count(": diff: unset\n") == len(names), "git takes it for text"


@pytest.mark.parametrize(
    "module", ["router.server", "deploy.cli", "kvtransfer", "common.codec", "common.rpc", "common.tokenizer"]
)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'ray', 'numpy', 'transformers', 'opentelemetry.sdk'} & set(sys.modules)"
    script = f"import sys, {module}; heavy = {heavy}; sys.exit(f'{module} loads {{heavy}}' if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_engine_without_a_gpu_loads_no_triton() -> None:
    script = "import sys, common.engine.engine, common.engine.runner; sys.exit('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_top_level_of_the_repository_holds_what_is_listed() -> None:
    if (ROOT / ".git").exists():  # what is staged or committed: the folder itself may hold anybody's scratch files
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        found = {name.partition("/")[0] for name in done.stdout.splitlines()}
    else:
        ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"]
        found = {path.name for path in ROOT.iterdir() if not any(fnmatch(path.name, pattern) for pattern in ignored)}
    assert found <= TOP_LEVEL, f"not in the plan: {sorted(found - TOP_LEVEL)}"
    missing = sorted(name for name in TOP_LEVEL if not (ROOT / name).exists())
    assert not missing, f"in the plan but not there: {missing}"


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", distribution, maxsplit=1)[0]).lower()


def test_every_library_that_is_imported_is_declared() -> None:
    extras = PROJECT["optional-dependencies"]
    declared = {_normal(name) for name in PROJECT["dependencies"]}
    declared |= {
        _normal(name)
        for extra in ("engine", "ray", "redis", "nixl", "gpu", "otel", "embed", "xgrammar")
        for name in extras[extra]
    }
    # starlette is FastAPI's face; its name is part of that library's contract
    declared |= {"starlette", "pydantic-core", "annotated-types"}
    owners = importlib.metadata.packages_distributions()
    undeclared = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - set(PACKAGES) - sys.stdlib_module_names:
                if not declared & {_normal(owner) for owner in owners.get(name, [name])}:
                    undeclared.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert undeclared == []
