"""`pdserve up`: brings a cluster up and stays with it (`deploy.launcher`)."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.output import errors_as_lines, say

if TYPE_CHECKING:
    from common.config import Config

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "local.yaml"


def up(
    config: Annotated[Path, typer.Argument(help="The cluster's YAML file.")] = DEFAULT_CONFIG,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the file.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of the OpenAI HTTP server; 0 takes a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC server; 0 takes a free one.")] = None,
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
        from common.logs import configure_logging

        configure_logging(loaded.logging, process="launcher")
        raise typer.Exit(_launch(config.resolve(), tuple(given), loaded))


def _launch(path: Path, overrides: tuple[str, ...], config: Config) -> int:
    from common.errors import ClusterError
    from deploy.ray_environment import CLUSTER_ID_VARIABLE, private_cluster_variables

    cluster_id = uuid.uuid4().hex
    if config.ray.address is None:
        os.environ.pop("RAY_ADDRESS", None)  # of another cluster; children must not follow it
        os.environ.update(private_cluster_variables(cluster_id))
    else:
        os.environ[CLUSTER_ID_VARIABLE] = cluster_id
    try:
        # Only now: Ray reads its variables when it is imported.
        from deploy.launcher import Launch, launch
    except ModuleNotFoundError as error:
        raise ClusterError(f"`pdserve up` needs {error.name}: pip install 'pdserve[engine,ray]'") from error
    return launch(Launch(path, overrides, config, cluster_id), say)
