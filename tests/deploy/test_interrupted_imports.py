"""Ctrl-C while modules are imported: an exit status and no traceback, neither of ours nor of a library that was cut in half."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

import deploy
from common.config import Config
from deploy import cli
from deploy.commands import up


class Import(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Does something else in place of one module."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._act = act

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == self._name else None

    def exec_module(self, module: ModuleType) -> None:
        self._act(module)


@contextmanager
def importing(name: str, act: Callable[[ModuleType], None]) -> Iterator[None]:
    short = name.rpartition(".")[2]
    modules, finders, known = dict(sys.modules), list(sys.meta_path), vars(deploy).get(short)
    sys.modules.pop(name, None)
    sys.meta_path.insert(0, Import(name, act))
    try:
        yield
    finally:
        sys.meta_path[:] = finders
        sys.modules.pop(name, None)
        sys.modules.update({name: modules[name]} if name in modules else {})
        vars(deploy).pop(short, None)
        if known is not None:
            setattr(deploy, short, known)


def test_before_anything_has_begun() -> None:
    def interrupt(module: ModuleType) -> None:
        raise KeyboardInterrupt

    with importing("deploy.app", interrupt), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


def test_ray_is_imported_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def interrupt(module: ModuleType) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        module.Launch = module.launch = None  # type: ignore[attr-defined]
        reached.append("its end")

    monkeypatch.setattr(os, "environ", dict(os.environ))
    config = Config.model_validate({"models": [{"name": "m", "source": "m"}]})
    with importing("deploy.launcher", interrupt), pytest.raises(KeyboardInterrupt):
        up._launch(Path("m.yaml"), (), config, None)
    assert reached == ["its end"]
