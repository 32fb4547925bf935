"""Starts a Ray of our own, or joins one. The variables of `deploy.ray_environment` must be in the environment already."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from common.errors import ClusterError

_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # nothing of ours lives there; this is about the least that Ray takes


def start_private_ray(folder: Path) -> None:
    """Starts Ray under `folder` (a short path: socket names are limited to 107 bytes) and connects.

    NOTE: call it on the main thread. The kernel ends Ray's processes together with the thread that started them.
    """
    # NOTE: without address="local" Ray joins whatever cluster it finds on the machine.
    _initialise(
        address="local",
        _temp_dir=str(folder),
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
    )


def join_ray(address: str) -> None:
    """Connects to somebody else's Ray. Raises ClusterError if that spans hosts: ports of ours stay on loopback."""
    _initialise(address=address)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in nodes] != [here]:
        raise ClusterError(
            f"the Ray cluster has {len(nodes)} nodes, but workers listen on loopback only: they must all be on this host",
            param="ray.address",
        )


def _initialise(**options: Any) -> None:
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True, **options)
    except (RayError, ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray did not start: {error}", param="ray") from error
