"""What all tests share."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.asked_marks import may_be_meant, named_marks, refuse_unnamed_marks

if TYPE_CHECKING:
    from common.model_store import ModelFiles

# Before torch is imported: several engines share this process, and their OpenMP threads would wait for each other by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test has two of them, on cores that others use as well, each operation would spin until the other's turn comes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton decides with its first import, which may be a library's, whether kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A suite that was started in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = (
    "chaos",
    "exactness",
    "model_checking",
    "simulation",
    "workers",
    "zoo",
    "common/engine/automata",
    "common/engine/native/test_native_choice.py",
    "kvtransfer/ranks/test_groups.py",
    "kvtransfer/test_nixl.py",
    "router/console/test_page.py",
    "router/store/test_redis_faults.py",
    "router/store/test_replicas.py",
)
"""What takes minutes together: real workers, faults in real processes, searches. Marked `long`, so that the rest stays quick."""


TESTS = Path(__file__).parent
OF_STAGES = ("model", "cluster", "hosts", "clients", "gpu")


@functools.cache
def is_long(path: Path) -> bool:
    inside = path.relative_to(TESTS).as_posix() + "/"
    return any(inside.startswith(name + "/") for name in LONG)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What has no test that `-m` can mean is not read, unless it is named on the command line."""
    if any(str(collection_path).endswith(named.partition("::")[0]) for named in config.args):
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any(_may_be_meant(file, config.option.markexpr) for file in files) else True


def _may_be_meant(file: Path, expression: str) -> bool:
    marks = named_marks(file)
    by_folder = {"long"} if is_long(file) else set()
    return may_be_meant(expression, certain=marks.of_all | by_folder, possible=marks.of_some)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device; torch is loaded only if there are any."""
    for item in items:
        if is_long(item.path):
            item.add_marker(pytest.mark.long)
    refuse_unnamed_marks(items, OF_STAGES)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    """The default model, fetched if it is not in the model cache. Tests that use it are marked `model`."""
    from common.model_store import pull

    return pull("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> ModelFiles:
    """The second model, fetched if it is not in the model cache; without it its tests are skipped. They are marked `model`."""
    from common.errors import ModelLoadError
    from common.model_store import pull

    try:
        return pull("gemma3-270m")
    except ModelLoadError as error:
        pytest.skip(f"gemma3-270m cannot be had: {error.message}")
