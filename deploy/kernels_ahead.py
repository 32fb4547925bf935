"""Compiles the decoder's kernels for workers on this machine while models are fetched and Ray and the workers start.

The compiler takes as long as all the rest of a first start. It runs in a thread that nobody waits for, behind what starts: a
worker serves by torch until it is through, and one that has to wait (exact mode, ranks, large files in blocks) waits for a lock.
One that finds no compiler says so itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from common.config import EngineConfig
from common.engine.native.build import compile_ahead
from common.logs import get_logger
from common.native_build import BuildError

_log = get_logger(__name__)
_GPU = Path("/dev/nvidiactl")
_BEHIND_OTHERS = 10


def compile_kernels_ahead(engines: Sequence[EngineConfig], cache: Path) -> threading.Thread | None:
    """In a thread of its own, if any of these may compute on this machine's CPU."""
    if not any(_computes_here(engine) for engine in engines):
        return None
    thread = threading.Thread(target=_compile, args=(cache,), name="kernels-ahead", daemon=True)
    thread.start()
    return thread


def _computes_here(engine: EngineConfig) -> bool:
    on_cpu = engine.device == "cpu" or (engine.device == "auto" and not _GPU.exists())
    return on_cpu and engine.kernels in ("auto", "native")


def _compile(cache: Path) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BEHIND_OTHERS)  # of this thread, and the compiler inherits it
    try:
        compile_ahead(cache)
    except BuildError as error:
        _log.info("kernels were not compiled ahead; workers will say whether they serve without", reason=str(error))
