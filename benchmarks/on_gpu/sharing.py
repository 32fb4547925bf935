"""Ways in which two engines share one GPU, and which of them can be had here. No setting of the card is changed by any.

    turns     two processes; the driver gives the GPU to one after the other
    mps       two processes, joined by a server of NVIDIA's: one that is there, or one of our own, in a folder of our own and as
              long as it is needed. Prompts may not take all multiprocessors, and come second
    streams   one process, two engines on threads; decode steps go to a stream of higher priority
    green     one process, two engines on threads; each has multiprocessors of its own (`common.engine.green_contexts`)

In one process the engines also share Python's lock: what a step's launches cost the host is part of what is measured.
"""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from common.engine.green_contexts import divided_streams, load_driver, on_stream
from common.errors import StartupError

DECODE_SHARE = 0.3  # of the multiprocessors: a decode step waits for memory, a prompt for multiplications
DEFAULT_PIPES = Path("/tmp/nvidia-mps")
CONTROL = "nvidia-cuda-mps-control"
START_S = 20.0
_HIGH, _LOW = -1, 0

Lane = Callable[[], AbstractContextManager[object]]
"""Makes what a thread is in while it computes for an engine."""


class Sharing(enum.Enum):
    TURNS = "turns"
    STREAMS = "streams"
    GREEN = "green"
    MPS = "mps"

    @property
    def in_one_process(self) -> bool:
        return self in (Sharing.STREAMS, Sharing.GREEN)


class Role(enum.Enum):
    WHOLE = "whole"
    PREFILL = "prefill"
    DECODE = "decode"


def lanes(sharing: Sharing, device: str) -> tuple[Lane, Lane, str]:
    """Of a process with two engines: of its decode engine, of its prefill engine, and what to say of it. Raises StartupError."""
    if device == "cpu" or not sharing.in_one_process:
        return nullcontext, nullcontext, "one process, two threads"
    torch.cuda.init()
    if sharing is Sharing.STREAMS:
        decode, prefill = torch.cuda.Stream(priority=_HIGH), torch.cuda.Stream(priority=_LOW)
        return lambda: torch.cuda.stream(decode), lambda: torch.cuda.stream(prefill), "streams of two priorities"
    torch.zeros(1, device="cuda")  # the context that is to be divided
    streams = divided_streams(load_driver(), DECODE_SHARE, torch.cuda.current_device(), (_HIGH, _LOW))
    (decode_at, decode_sms), (prefill_at, prefill_sms) = streams
    said = f"{decode_sms} multiprocessors decode, {prefill_sms} compute prompts"
    return lambda: on_stream(decode_at), lambda: on_stream(prefill_at), said


def environment_of(role: Role, pipes: Path | None) -> dict[str, str]:
    """Of a process that is joined to others by the server behind `pipes`; None: by nobody."""
    if pipes is None:
        return {}
    joined = {"CUDA_MPS_PIPE_DIRECTORY": str(pipes)}
    if role is Role.PREFILL:
        percent = round(100 * (1.0 - DECODE_SHARE))
        joined |= {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent), "CUDA_MPS_CLIENT_PRIORITY": "1"}
    return joined


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """What processes that are started within it inherit."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def running_server() -> Path | None:
    """The folder of an MPS server that is there already."""
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or DEFAULT_PIPES)
    return pipes if (pipes / "control").exists() else None


@contextmanager
def mps_server() -> Iterator[Path]:
    """The folder of a server: of one that is there, or of one for as long as this lasts. Raises StartupError."""
    found = running_server()
    if found is not None:
        yield found
        return
    tool = shutil.which(CONTROL)
    if tool is None:
        raise StartupError(f"no MPS server is there, and no {CONTROL} to start one", param="sharing")
    with tempfile.TemporaryDirectory(prefix="mps") as folder:
        pipes = Path(folder) / "pipes"
        own = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(Path(folder) / "log")}
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            Path(own[name]).mkdir()
        server = subprocess.Popen(
            [tool, "-f"], env=own, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            _await_control(server, pipes)
            yield pipes
        finally:
            _end(server, tool, own)


def _await_control(server: subprocess.Popen[bytes], pipes: Path) -> None:
    until_s = time.monotonic() + START_S
    while not (pipes / "control").exists():
        try:
            server.wait(0.05)
        except subprocess.TimeoutExpired:
            if time.monotonic() < until_s:
                continue
            raise StartupError(f"{CONTROL} took no calls within {START_S:.0f} s", param="sharing") from None
        said = b"" if server.stdout is None else server.stdout.read(2000)
        raise StartupError(f"{CONTROL} ended with {server.returncode}: {said.decode(errors='replace')}", param="sharing")


def _end(server: subprocess.Popen[bytes], tool: str, environment: Mapping[str, str]) -> None:
    """As it wants to be asked, for it has a child of its own; and if it does not listen, at once."""
    if server.poll() is None:
        try:
            subprocess.run([tool], input=b"quit\n", env=dict(environment), capture_output=True, timeout=10, check=False)
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    if server.stdout is not None:
        server.stdout.close()


def obstacle_of(sharing: Sharing, device: str) -> str | None:
    """Why it cannot be had here; None if it might be."""
    if device == "cpu":
        return None if sharing in (Sharing.TURNS, Sharing.STREAMS) else "there is no GPU to be divided"
    match sharing:
        case Sharing.GREEN:
            try:
                load_driver()
            except StartupError as error:
                return error.message
        case Sharing.MPS:
            if running_server() is None and shutil.which(CONTROL) is None:
                return f"no MPS server is there, and no {CONTROL} to start one"
        case _:
            pass
    return None
