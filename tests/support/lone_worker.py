"""A decode worker of several ranks in a process of its own: `python -m support.lone_worker MODEL TENSOR_PARALLEL`.

Prints the pids of its other ranks when it serves, and serves until it is killed.
"""

from __future__ import annotations

import asyncio
import sys

from common.config import DecodeConfig, EngineConfig, LoggingConfig, ModelConfig, TransferConfig
from common.logs import configure_logging
from common.types import Role
from common.worker import WorkerSpec
from decode_worker.server import DecodeWorker


async def main() -> None:
    configure_logging(LoggingConfig(), process="worker")  # not to stdout
    path, tensor_parallel = sys.argv[1], int(sys.argv[2])
    model = ModelConfig(
        name="tiny",
        source=path,
        engine=EngineConfig(dtype="float32", kernels="torch", kv_pool_tokens=256),
        decode=DecodeConfig(tensor_parallel=tensor_parallel),
    )
    worker = DecodeWorker(WorkerSpec("tiny/decode/0", 1, Role.DECODE, model, path, TransferConfig(), "token"))
    await worker.start()
    group = worker._host.engine.group
    assert group is not None
    sys.stdout.write(" ".join(map(str, group.pids)) + "\n")
    sys.stdout.flush()
    await worker.wait_failed()


asyncio.run(main())
