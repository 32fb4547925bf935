"""Servers of one model on this machine, each started by its own command as a user would, on a port of loopback.

    async with running(server, folder) as running:  ready: it named its model and answered one request      the group has ended

Output goes to a file per server, whose last lines are in the error if it does not come up. A server is ended by its process
group, first asked and then killed. Peers get what their manuals name as best for a CPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import yaml

from benchmarks.comparison.installation import Installation, preloads
from benchmarks.load.client import HttpConnections, OpenAIClient, Outcome

START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 30.0
_LOOK_EVERY_S = 0.5
_LAST_LINES = 12
MODEL_NAME = "measured"
_CHECKOUT = Path(__file__).resolve().parents[2]
# Who started this program may have meant it alone: each server is to find its own packages, and its own number of threads.
_NOT_HANDED_ON = frozenset({"PYTHONPATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY"})


class ServerFailed(Exception):
    """It did not come up, with what it said last."""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    version: str
    command: tuple[str, ...]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    note: str = ""  # what it costs in quality, if anything

    def described(self) -> dict[str, Any]:
        return {"version": self.version, "command": list(self.command), "environment": dict(self.environment), "note": self.note}


@dataclass(frozen=True, slots=True)
class Running:
    server: Server
    pid: int
    connections: HttpConnections
    model: str


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def vllm(
    installation: Installation, model: Path, *, cores: Sequence[int], name: str = "vllm", more: Sequence[str] = ()
) -> Server:
    port = free_port()
    command = (
        *(str(installation.program), "serve", str(model), "--served-model-name", MODEL_NAME),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "64"),
        *("--enable-prefix-caching", "--enable-chunked-prefill", "--disable-log-stats", *more),
    )
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": f"{min(cores)}-{max(cores)}",
        "LD_PRELOAD": ":".join(preloads(installation)),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Server(name, installation.version, command, port, environment)


def llama(installation: Installation, model: Path, *, cores: Sequence[int], name: str = "llama.cpp") -> Server:
    port, threads = free_port(), str(len(cores))
    command = (
        *(str(installation.program), "--model", str(model), "--alias", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--threads", threads, "--threads-batch", threads, "--parallel", "16", "--ctx-size", "65536", "--flash-attn", "on"),
        *("--no-webui", "--log-verbosity", "1"),
    )
    return Server(name, installation.version, command, port)


def pdserve(name: str, folder: Path, model: Path, settings: Mapping[str, Any], *, version: str, note: str = "") -> Server:
    """`settings` are the model's, over what every setting shares; the configuration is a file that anybody can start again."""
    port = free_port()
    configuration = {
        "cluster": f"peers-{name.removeprefix('pdserve-')}",
        "models": [{"name": MODEL_NAME, "source": str(model), **settings}],
        "router": {"http_port": port, "grpc_port": free_port()},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(configuration, sort_keys=False))
    command = (sys.executable, "-m", "deploy.cli", "up", str(path))
    return Server(name, version, command, port, {"PYTHONPATH": str(_CHECKOUT)}, note=note)


@asynccontextmanager
async def running(server: Server, folder: Path) -> AsyncIterator[Running]:
    """Raises ServerFailed."""
    log = folder / f"{server.name}.log"
    process = _start(server, log)
    # Answers that a router has kept are not what is measured; a server that does not know the header passes over it.
    headers = {"Accept": "text/event-stream", "x-cache": "bypass"}
    connections = HttpConnections(f"http://127.0.0.1:{server.port}", headers)
    try:
        yield Running(server, process.pid, connections, await _until_ready(server, process, connections, log))
    finally:
        await connections.close()
        await asyncio.to_thread(_end, process)


def _start(server: Server, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            server.command,
            env={**{name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}, **server.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


async def _until_ready(server: Server, process: subprocess.Popen[bytes], connections: HttpConnections, log: Path) -> str:
    loop = asyncio.get_running_loop()
    client = OpenAIClient(connections, timeout_s=START_TIMEOUT_S, now=loop.time)
    deadline_s = loop.time() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise ServerFailed(f"{server.name} ended with {process.returncode}: {_last_lines(log)}")
        try:
            model = await client.first_model()
            outcome = Outcome(0, loop.time(), 4)
            body = {"model": model, "prompt": [1000, 1001, 1002], "max_tokens": 4, "temperature": 0, "stream": True}
            await client.send("/v1/completions", json.dumps(body).encode(), outcome)
            if outcome.error is None:
                return model
        except (OSError, ValueError, TimeoutError, httptools.HttpParserError) as error:
            outcome = Outcome(0, 0.0, 0)
            outcome.fail(type(error).__name__, str(error))
        if loop.time() > deadline_s:
            raise ServerFailed(f"{server.name} did not answer in {START_TIMEOUT_S:g} s ({outcome.error}): {_last_lines(log)}")
        await asyncio.sleep(_LOOK_EVERY_S)  # foreign servers tell nobody when they are ready


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind in its session
    except ProcessLookupError:
        return


def _last_lines(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
