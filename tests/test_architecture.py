"""The floor plan as a table, enforced. An import goes down, never up or sideways; the table below says what "down" is.

Every import in the six packages is looked at: at the top of a file, inside a function, for types only, relative, and by
`importlib.import_module("...")`. To change the plan, change the table, with the reason.
"""

from __future__ import annotations

import ast
import enum
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "kvtransfer", "prefill_worker", "decode_worker", "router", "deploy")
UNITS = (*PACKAGES, "common.engine", "common.engine.triton_kernels", "common.wire", "router.semantic")

# unit: (what of ours it may import, why not more)
FLOORS: dict[str, tuple[frozenset[str], str]] = {
    "common": (
        frozenset({"common", "common.wire"}),
        "the waist knows nobody above it, and no engine: the router must stay small",
    ),
    "common.wire": (frozenset({"common.wire"}), "generated code knows only generated code"),
    "common.engine": (
        frozenset({"common", "common.engine", "common.engine.triton_kernels"}),
        "the engine computes; it knows no transfer, no wire format, no worker",
    ),
    "common.engine.triton_kernels": (
        frozenset({"common", "common.engine", "common.engine.triton_kernels"}),
        "kernels are a part of the engine that only the engine chooses",
    ),
    "kvtransfer": (frozenset({"common", "kvtransfer"}), "transfer sees memory as regions and a layout, never the engine"),
    "prefill_worker": (
        frozenset({"common", "common.wire", "common.engine", "kvtransfer", "prefill_worker"}),
        "prefill and decode workers are siblings: they meet on the wire",
    ),
    "decode_worker": (
        frozenset({"common", "common.wire", "common.engine", "kvtransfer", "decode_worker"}),
        "prefill and decode workers are siblings: they meet on the wire",
    ),
    "router": (
        frozenset({"common", "common.wire", "router", "router.semantic"}),
        "the router speaks to workers over gRPC and holds no KV",
    ),
    "router.semantic": (
        frozenset({"common", "router", "router.semantic"}),
        "the semantic cache computes; it speaks to nobody but the store",
    ),
    "deploy": (frozenset(UNITS), "the roof builds the processes"),
}

# file: what it may import beyond its unit.
EXCEPTIONS: dict[str, frozenset[str]] = {
    # What surrounds the engine in a worker's process; both workers share it, and neither can import it from the other.
    "common/engine/host.py": frozenset({"common.wire"}),
}

# Inside a worker, these files alone may import kvtransfer, and nobody else anywhere may import it together with the engine.
# The rank processes of a worker are started with both, by a file that has nothing else in it.
HANDOFFS = frozenset(
    f"{worker}/{name}.py" for worker in ("prefill_worker", "decode_worker") for name in ("handoff", "rank_process")
)


class When(enum.Enum):
    ALWAYS = "always"
    LAZILY = "inside functions or for types only"


# library: ({unit or file: when}, why not elsewhere). A library that is not listed may be imported anywhere.
LIBRARIES: dict[str, tuple[dict[str, When], str]] = {
    "torch": (
        {"common.engine": When.ALWAYS, "common.engine.triton_kernels": When.ALWAYS, "deploy": When.LAZILY},
        "torch lives in common/engine: the others start fast and fit in a small image",
    ),
    "xgrammar": (
        {"common/engine/automata/x.py": When.LAZILY},
        "it is an extra, and reads only what llguidance has read before",
    ),
    "llguidance": (
        {
            "common/grammar/compiling.py": When.ALWAYS,
            "common/grammar/examiner.py": When.ALWAYS,
            "common/engine/automata/guidance.py": When.LAZILY,
        },
        "grammars are compiled in workers and in a process that may be killed, never in the router's own",
    ),
    "nixl_cu13": ({"kvtransfer": When.LAZILY}, "one transport among others, and an extra"),
    "triton": (
        {"common.engine.triton_kernels": When.ALWAYS},  # itself imported lazily, by an engine that has them compute
        "only kernels need triton, and only where there is a GPU",
    ),
    "safetensors": ({"common.engine": When.ALWAYS}, "weights are the engine's business"),
    "numpy": (
        {
            "common.engine": When.ALWAYS,
            "common.engine.triton_kernels": When.ALWAYS,
            "kvtransfer": When.ALWAYS,
            "common": When.LAZILY,
            "common/gguf_reader.py": When.ALWAYS,  # itself imported lazily, by whoever meets a GGUF file
            "router": When.LAZILY,
            "router/models/likeness.py": When.ALWAYS,  # imported by predictor.py alone
            "router/models/predictor.py": When.ALWAYS,  # itself imported lazily, by a router that has a predictor
            "router.semantic": When.ALWAYS,  # itself imported lazily, by a router that has the semantic cache on
            "deploy": When.LAZILY,
        },
        "it costs a tenth of a second and 30 MB in every process that does not compute",
    ),
    "onnxruntime": ({"router.semantic": When.LAZILY}, "one embedder among others, and an extra"),
    "ray": ({"deploy": When.ALWAYS}, "Ray places processes; no call of it is on a request's path"),
    "fastapi": ({"router": When.ALWAYS, "deploy": When.ALWAYS}, "HTTP is spoken at the edge only"),
    "starlette": ({"router": When.ALWAYS, "deploy": When.ALWAYS}, "HTTP is spoken at the edge only"),
    "uvicorn": ({"router": When.ALWAYS, "deploy": When.ALWAYS}, "HTTP is spoken at the edge only"),
    "grpc": (
        {
            home: When.ALWAYS
            for home in (
                "common",
                "common.wire",
                "common/engine/host.py",
                "prefill_worker",
                "decode_worker",
                "router",
                "deploy",
            )
        },
        "gRPC carries control; bulk KV and the engine do without it",
    ),
    "redis": (
        {"router": When.LAZILY, "deploy/diagnosis/shared_store.py": When.LAZILY},
        "redis is an extra: a router without it must import",
    ),
    "opentelemetry": (
        {"common/tracing/otlp.py": When.ALWAYS},  # itself imported lazily, by a process that traces
        "an extra: who does not trace does not load it",
    ),
    "transformers": ({}, "an oracle for tests, not a dependency"),
    "grpc_tools": ({}, "generated code is checked in; nobody runs protoc at run time"),
    "tests": ({}, "tests are not shipped"),
    "benchmarks": ({}, "benchmarks are not shipped"),
}


@dataclass(frozen=True)
class Import:
    line: int
    target: str  # absolute dotted name; for `from a import b` both `a` and `a.b` are reported
    lazy: bool


def unit_of(dotted_name: str) -> str | None:
    """The most specific unit that holds a dotted name; None if it is not ours."""
    holders = [unit for unit in UNITS if dotted_name == unit or dotted_name.startswith(unit + ".")]
    return max(holders, key=len, default=None)


def imports_of(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import | str]:
    """All imports of a file; a str is a complaint about one that cannot be read (`line: what`)."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import | str]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if is_package else module.rpartition(".")[0]
                base = importlib.util.resolve_name("." * node.level + base, package)
            yield Import(node.lineno, base, lazy)
            yield from (Import(node.lineno, f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "import_module", "importlib.import_module"):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield Import(node.lineno, name, lazy)
                case _:
                    yield f"{node.lineno}: imports a name that is not a literal, so that the floor plan cannot be checked"
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, lazy)
            return
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(tree, False)


def complaints_about(root: Path, path: Path) -> list[str]:
    relative = path.relative_to(root).as_posix()
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    here = unit_of(module)
    assert here is not None, relative
    allowed, floor_reason = FLOORS[here]
    allowed |= EXCEPTIONS.get(relative, frozenset())
    complaints: dict[str, None] = {}  # ordered; `import a.b` and `from a import b` may say a thing twice
    ours: dict[str, int] = {}
    for item in imports_of(ast.parse(path.read_bytes()), module, is_package=path.name == "__init__.py"):
        if isinstance(item, str):
            complaints[f"{relative}:{item}"] = None
            continue
        where = f"{relative}:{item.line}: {here} imports {item.target}"
        target = unit_of(item.target)
        if target is not None:
            ours.setdefault(target, item.line)
            if target not in allowed:
                complaints[f"{where}; rule: {here} may import only {', '.join(sorted(allowed))}; because {floor_reason}"] = None
            elif target == "kvtransfer" and here in ("prefill_worker", "decode_worker") and relative not in HANDOFFS:
                complaints[
                    f"{where}; rule: in a worker only handoff.py may; because it is the one seam of engine and transfer"
                ] = None
            continue
        library = item.target.partition(".")[0]
        if library not in LIBRARIES:
            continue
        homes, library_reason = LIBRARIES[library]
        when = homes.get(relative, homes.get(here))
        if when is None:
            places = ", ".join(sorted(homes)) or "no package"
            complaints[f"{where}; rule: {library} may appear only in {places}; because {library_reason}"] = None
        elif when is When.LAZILY and not item.lazy:
            complaints[f"{where}; rule: {here} may import {library} only {When.LAZILY.value}; because {library_reason}"] = None
    if {"common.engine", "kvtransfer"} <= ours.keys() and relative not in HANDOFFS and here != "kvtransfer":
        line = max(ours["common.engine"], ours["kvtransfer"])
        complaints[
            f"{relative}:{line}: imports common.engine and kvtransfer; rule: only {', '.join(sorted(HANDOFFS))} may know both; "
            "because they are the two files that must be read to understand disaggregation"
        ] = None
    return list(complaints)


def check(root: Path) -> list[str]:
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return [complaint for path in files for complaint in complaints_about(root, path)]


def test_the_floor_plan_holds() -> None:
    complaints = check(ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_table_speaks_of_every_unit_and_of_no_other() -> None:
    assert FLOORS.keys() == set(UNITS)
    homes = {home for homes, _ in LIBRARIES.values() for home in homes} | EXCEPTIONS.keys()
    assert {home for home in homes if not home.endswith(".py")} <= set(UNITS)
    assert all((ROOT / home).is_file() for home in homes if home.endswith(".py")), "a file of the table is gone"
    assert all((ROOT / unit.replace(".", "/") / "__init__.py").is_file() for unit in UNITS)


PLANTED = {
    "router/up.py": "import os\nfrom deploy.cli import main\n",
    "router/engine.py": "from common import engine\n",
    "router/lazy_torch.py": "def f():\n    import torch.nn\n",
    "router/early_numpy.py": "import numpy as np\n",
    "router/by_name.py": "import importlib\nimportlib.import_module('ray')\n",
    "router/by_variable.py": "import importlib\nimportlib.import_module(chosen)\n",
    "kvtransfer/transports/typed.py": "import typing\nif typing.TYPE_CHECKING:\n    from common.engine import kv_pool\n",
    "decode_worker/sideways.py": "from prefill_worker import scheduler\n",
    "decode_worker/server.py": "from kvtransfer.receiver import KVReceiver\n",
    "common/engine/layers/relative.py": "from ...wire import types_pb2\n",
    "deploy/both.py": "import kvtransfer.sender\nfrom common.engine import runner\n",
    "common/early_numpy.py": "import numpy\n",
    "common/up.py": "from router import server\n",
    "common/engine/wire.py": "from common.wire import types_pb2\n",
    "common/engine/kernel.py": "def f():\n    import triton\n",
}
ALLOWED = {
    "router/good.py": "import torchlike\nfrom common.wire import types_pb2\nfrom . import up\ndef f():\n    import numpy\n",
    "decode_worker/handoff.py": "from common.engine import kv_pool\nfrom kvtransfer import receiver\n",
    "deploy/actor.py": "import ray\nfrom decode_worker.server import DecodeWorker\n",
    "common/engine/triton_kernels/kernel.py": "import triton\nimport torch\n",
    "common/engine/good.py": "import torch\nfrom common.types import KVLayout\nfrom .batch import ScheduledBatch\n",
}


def test_each_planted_violation_is_found_with_its_line_and_nothing_else(tmp_path: Path) -> None:
    for name, text in {**PLANTED, **ALLOWED}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {tuple(complaint.split(": ")[0].split(":")) for complaint in check(tmp_path)}
    last_lines = {(name, str(text.count("\n"))) for name, text in PLANTED.items()}
    assert found == last_lines


def test_our_names_are_not_names_of_the_standard_library() -> None:
    assert not set(PACKAGES) & sys.stdlib_module_names
