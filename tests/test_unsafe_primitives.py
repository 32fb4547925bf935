"""What the packages must not call: primitives that run foreign code, hide errors, block, or talk to a terminal.

Files, sockets and Redis hold outside data; none of it may reach a loader that can execute it. The check reads the syntax tree,
so that a renamed import (`from yaml import load as l`) is seen and a word in a comment is not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "kvtransfer", "prefill_worker", "decode_worker", "router", "deploy")

FORBIDDEN_IMPORTS = ("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "ray.cloudpickle")
FORBIDDEN_CALLS = {
    "eval": "it runs data as code",
    "exec": "it runs data as code",
    "compile": "it turns data into code",
    "print": "libraries log; only a terminal program draws, and it has a console object",
    "torch.load": "it unpickles; weights come from safetensors or GGUF",
    "numpy.load": "it may unpickle",
    "pandas.read_pickle": "it unpickles",
    "yaml.load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.unsafe_load": "it builds arbitrary objects",
    "yaml.unsafe_load_all": "it builds arbitrary objects",
    "yaml.full_load": "it builds arbitrary objects",
    "yaml.full_load_all": "it builds arbitrary objects",
    "jinja2.Environment": "templates are foreign: use the sandboxed environment",
    "jinja2.Template": "templates are foreign: use the sandboxed environment",
    "os.system": "it goes through a shell",
    "os.popen": "it goes through a shell",
    "tempfile.mktemp": "another process may take the name first",
    "time.sleep": "wait on an event or a condition, with a deadline",
}
BROAD = {"Exception", "BaseException"}


def aliases_of(tree: ast.Module) -> dict[str, str]:
    """What each name that an import binds in the file really is: {"np": "numpy", "load": "yaml.load"}."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                aliases[bound] = alias.name if alias.asname else bound
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            aliases.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return aliases


def full_name(node: ast.expr, aliases: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join((aliases.get(node.id, node.id), *reversed(parts))).removeprefix("builtins.")


def caught(handler: ast.ExceptHandler, aliases: dict[str, str]) -> Iterator[str]:
    if handler.type is None:
        yield "BaseException"
    elif isinstance(handler.type, ast.Tuple):
        yield from (full_name(kind, aliases) for kind in handler.type.elts)
    else:
        yield full_name(handler.type, aliases)


def raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether the handler's own body ends in `raise`: on every way out, not only on some."""
    return isinstance(handler.body[-1], ast.Raise)


def complaints_in(source: bytes | str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    aliases = aliases_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [prefix + alias.name for alias in node.names]
            if any(name == bad or name.startswith(bad + ".") for name in names for bad in FORBIDDEN_IMPORTS):
                yield node.lineno, f"imports {', '.join(names)}: it runs code on loading"
        elif isinstance(node, ast.Call):
            name = full_name(node.func, aliases)
            if name in FORBIDDEN_CALLS:
                yield node.lineno, f"calls {name}: {FORBIDDEN_CALLS[name]}"
            shell = next((word.value for word in node.keywords if word.arg == "shell"), None)
            if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
                yield node.lineno, f"calls {name} with shell=: name the program and its arguments"
        elif isinstance(node, ast.ExceptHandler) and BROAD & set(caught(node, aliases)) and not raises_again(node):
            yield node.lineno, "catches everything without raising again: name the error, or let it pass"


def test_the_packages_use_none() -> None:
    complaints = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, what in complaints_in(path.read_bytes())
    ]
    assert not complaints, "\n" + "\n".join(complaints)


BAD = (
    "import pickle",
    "from ray import cloudpickle",
    "from marshal import loads",
    "def f():\n    import shelve",
    "eval('1')",
    "import builtins\nbuiltins.exec('1')",
    "import torch as t\nt.load('x')",
    "from yaml import load as read\nread('x')",
    "import yaml\nyaml.unsafe_load('x')",
    "from time import sleep\nsleep(1)",
    "print('x')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "try:\n    f()\nexcept:\n    g()",
    "try:\n    f()\nexcept Exception:\n    g()",
    "try:\n    f()\nexcept (OSError, BaseException) as e:\n    if e:\n        raise",
)
GOOD = (
    "import torch\nmodel.load('x')\ntorch.save_load",
    "import yaml\nyaml.safe_load('x')",
    "import re\nre.compile('x')",
    "import asyncio\nasyncio.sleep(1)",
    "try:\n    f()\nexcept BaseException:\n    g()\n    raise",
    "try:\n    f()\nexcept OSError:\n    g()",
    "# pickle.loads\n'eval(x)'",
)


def test_the_check_sees_what_it_should_and_no_more() -> None:
    assert [source for source in BAD if not list(complaints_in(source))] == []
    assert [source for source in GOOD if list(complaints_in(source))] == []
