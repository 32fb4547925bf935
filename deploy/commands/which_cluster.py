"""Which cluster a command is about: the one that is named; else `local`; else the only one there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deploy.cluster_state import ClusterState

DEFAULT_CLUSTER = "local"

ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="NAME",
        help="Name of the cluster, as in its configuration. Default: local, or the only one that runs here.",
        show_default=False,
    ),
]


def choose_cluster(given: str | None, *, among: Sequence[str]) -> str:
    """Raises InvalidRequest if there are several, and none of them is meant more than the others."""
    from common.errors import InvalidRequest

    if given is not None or not among or DEFAULT_CLUSTER in among:
        return given or DEFAULT_CLUSTER
    if len(among) > 1:
        raise InvalidRequest(f"there are several clusters here: {', '.join(among)}; choose with --cluster NAME", param="cluster")
    return among[0]


def chosen_state(given: str | None) -> ClusterState:
    """Of a cluster that runs. Raises ClusterError or InvalidRequest."""
    from common.config import pdserve_home
    from deploy.cluster_state import running_clusters, running_state

    home: Path = pdserve_home()
    return running_state(home, choose_cluster(given, among=running_clusters(home)))
