"""`pdserve up`: brings a cluster up and stays with it (`deploy.launcher`)."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, say

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator

    from common.config import Config

_TOLD_CHARACTERS = 4000
_LEAST_TOKEN_CHARACTERS = 32
_STOP_TIMEOUT_S = 60.0
DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "local.yaml"
EXAMPLES = examples(
    ("one small model, a prefill and a decode worker, on this machine", "pdserve up"),
    ("your own configuration, with one key changed", "pdserve up cluster.yaml --set router.http_port=8080"),
    ("is a configuration good, before it is started", "pdserve config check cluster.yaml"),
)


def up(
    config: Annotated[Path, typer.Argument(help="The cluster's YAML file.")] = DEFAULT_CONFIG,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the file.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of the OpenAI HTTP server; 0 takes a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC server; 0 takes a free one.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return as soon as `pdserve status` can be asked; `pdserve down` stops it.")
    ] = False,
    announce: Annotated[int | None, typer.Option(hidden=True, help="A descriptor to announce on.")] = None,
) -> None:
    """Starts router, prefill and decode workers, and serves until Ctrl-C."""
    from common.config import load_config

    with errors_as_lines():
        given = list(overrides or ())
        if http_port is not None:
            given.append(f"router.http_port={http_port}")
        if grpc_port is not None:
            given.append(f"router.grpc_port={grpc_port}")
        loaded = load_config(config, overrides=given)
        if detach:
            _detach(config.resolve(), given, loaded)
            return
        raise typer.Exit(_launch(config.resolve(), tuple(given), loaded, announce))


def _detach(path: Path, overrides: list[str], config: Config) -> None:
    """The same command in a session of its own, its output in a file; returns when it has announced itself. Before that the file
    has a name of its own: there may be a cluster of this name, and its log is not to be touched by one that is refused."""
    from common.config import pdserve_home
    from common.errors import ClusterError

    log = pdserve_home() / "logs" / f"{config.cluster}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    starting = log.with_suffix(f".{os.getpid()}.starting")
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "deploy.cli", "up", str(path), "--announce", str(writing)]
    for override in overrides:
        command += ["--set", override]
    try:
        with starting.open("wb") as sink, os.fdopen(reading, "rb") as pipe:
            try:
                with _interrupt_waits():
                    launcher = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, pass_fds=[writing], start_new_session=True
                    )
                    os.close(writing)
                said = pipe.read()  # to the end: the other side closes it when it has said it, or ends
            except KeyboardInterrupt:
                _stop(launcher)
                raise
        if not said:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(_STOP_TIMEOUT_S)  # it may have more to say
            told = starting.read_text(encoding="utf-8", errors="replace")[-_TOLD_CHARACTERS:]
            raise ClusterError(f"the cluster did not start:\n{told}")
        starting.replace(log)
    finally:
        starting.unlink(missing_ok=True)
    say(f"cluster {config.cluster!r} is starting its workers; what it says goes to {log}")


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """A Ctrl-C in here is raised at its end: a process that was forked but not yet bound to a name could not be stopped."""
    came = False

    def remember(_signal: int, _frame: types.FrameType | None) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _stop(launcher: subprocess.Popen[bytes]) -> None:
    """It has a session of its own, so the terminal's Ctrl-C does not reach it."""
    from common.errors import ClusterError

    say("stopping what was begun")
    launcher.send_signal(signal.SIGINT)
    try:
        launcher.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"the launcher (pid {launcher.pid}) has not ended within {_STOP_TIMEOUT_S:g} s") from error


def _launch(path: Path, overrides: tuple[str, ...], config: Config, announce: int | None) -> int:
    from common.errors import ClusterError
    from deploy.ray_environment import joining_variables, private_cluster_variables

    if announce is not None:
        os.set_inheritable(announce, False)
    # Given, it is shared with routers that somebody else starts; ours get it from the launcher.
    token = os.environ.pop("PDSERVE_CLUSTER_TOKEN", "") or secrets.token_hex(32)
    if len(token) < _LEAST_TOKEN_CHARACTERS:
        raise ClusterError(f"PDSERVE_CLUSTER_TOKEN needs {_LEAST_TOKEN_CHARACTERS} characters", param="PDSERVE_CLUSTER_TOKEN")
    cluster_id = uuid.uuid4().hex
    if config.ray.address is None:
        os.environ.pop("RAY_ADDRESS", None)  # of another cluster; children must not follow it
        os.environ.update(private_cluster_variables(cluster_id))
    else:
        os.environ.update(joining_variables(cluster_id))
    try:
        # Only now: Ray reads its variables when it is imported. Half imported, it complains at the end.
        with _interrupt_waits():
            from deploy.launcher import Launch, launch
    except ModuleNotFoundError as error:
        raise ClusterError(f"`pdserve up` needs {error.name}: pip install 'pdserve[engine,ray]'") from error
    return launch(Launch(path, overrides, config, token, cluster_id, announce), say)
