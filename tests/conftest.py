"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from common.model_store import ModelFiles

# Before torch is imported: several engines share this process, and their OpenMP threads would wait for each other by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is no CUDA device; torch is loaded only if there are any."""
    folders = tuple(Path(__file__).parent / name for name in LONG)
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in folders):
            item.add_marker(pytest.mark.long)
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
