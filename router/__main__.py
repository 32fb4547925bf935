"""`python -m router --config FILE --manager HOST:PORT`: one router process. The cluster token comes from PDSERVE_CLUSTER_TOKEN.

The first SIGINT or SIGTERM drains; a second one ends at once. Exit codes: 0 stopped, 1 could not start, 2 wrong arguments,
130 forced.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from common.config import Config, load_config
from common.errors import StartupError
from common.logs import configure_logging
from router.server import DRAIN_GRACE_S, run

TOKEN_VARIABLE = "PDSERVE_CLUSTER_TOKEN"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m router", description="Serves OpenAI HTTP and gRPC for a pdserve cluster.")
    parser.add_argument("--config", type=Path, required=True, help="the cluster's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a key of the file")
    parser.add_argument("--manager", required=True, metavar="ADDRESS", help="host:port of the pool manager")
    parser.add_argument("--drain-grace-s", type=float, default=DRAIN_GRACE_S, help="for what is in flight at a stop")
    given = parser.parse_args(arguments)
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        parser.error(f"{TOKEN_VARIABLE} is not set")
    try:
        config = load_config(given.config, overrides=given.set)
        configure_logging(config.logging, process="router")
        # Most of what a token costs here is spent in the loop: it is a fifth less over this one, which Ray's workers have too.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, given.manager, token, given.drain_grace_s))
    except StartupError as error:
        sys.stderr.write(f"router: {error.message}\n")
        return 1
    except asyncio.CancelledError:
        return 130
    return 0


async def _serve(config: Config, manager_address: str, token: str, drain_grace_s: float) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def on_signal() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    await run(
        config,
        manager_address=manager_address,
        cluster_token=token,
        stop=stop,
        on_ready=lambda http, grpc: None,  # the manager learns the addresses from the watch
        drain_grace_s=drain_grace_s,
    )


if __name__ == "__main__":
    sys.exit(main())
