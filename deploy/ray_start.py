"""Starts a Ray of our own, or joins one. The variables of `deploy.ray_environment` must be in the environment already."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import RayError

from common.errors import ClusterError
from common.logs import get_logger
from deploy.janitor import kill_all
from deploy.nodes import nodes_of
from deploy.ray_environment import CLUSTER_ID_VARIABLE

log = get_logger(__name__)

LOOPBACK = "127.0.0.1"
_OPEN_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_PROBE_TIMEOUT_S = 5.0
_MOST_STARTS = 2
_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # nothing of ours lives there; this is about the least that Ray takes


def start_private_ray(folder: Path) -> None:
    """Starts Ray under `folder` (a short path: socket names are limited to 107 bytes) and connects.

    NOTE: call it on the main thread. The kernel ends Ray's processes together with the thread that started them.
    """
    for attempt in range(_MOST_STARTS):
        try:
            # NOTE: without address="local" Ray joins whatever cluster it finds on the machine.
            _initialise(
                address="local",
                _temp_dir=str(folder),
                _node_ip_address=LOOPBACK,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
        except ClusterError as error:
            if attempt + 1 == _MOST_STARTS:
                raise
            # NOTE: seen on a busy machine: a raylet that does not register within its minute. The next one does.
            log.warning("Ray is started once more", reason=error.message)
            ray.shutdown()
            kill_all(os.environ[CLUSTER_ID_VARIABLE])
        else:
            return


def join_ray(address: str, *, trusted_network: bool) -> str:
    """Connects to somebody else's Ray. Returns where this host's ports are to listen: on loopback, or with the operator's word
    on the address under which Ray knows this node. Raises ClusterError for a cluster that is not to be served."""
    _initialise(address=address)
    nodes = [node for node in nodes_of(ray.nodes()) if node.alive]
    here = ray.get_runtime_context().get_node_id()
    if not trusted_network:
        if [node.node_id for node in nodes] != [here]:
            raise ClusterError(
                f"the Ray cluster has {len(nodes)} nodes, but nobody has said that the network between them is private",
                param="network.trusted",
            )
        return LOOPBACK
    if _lets_anybody_in(ray.get_runtime_context().gcs_address):
        raise ClusterError(
            "this Ray cluster asks nobody for a token: whoever reaches it can run code on it; start it with RAY_AUTH_MODE=token",
            param="ray.address",
        )
    return next(node.address for node in nodes if node.node_id == here)


def _lets_anybody_in(gcs_address: str) -> bool:
    """Whether Ray answers a call that bears no token."""
    channel = grpc.insecure_channel(gcs_address, options=[("grpc.enable_http_proxy", 0)])
    try:
        channel.unary_unary(_OPEN_CALL, _as_it_is, _as_it_is)(b"", timeout=_PROBE_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return False
        raise ClusterError(f"cannot find out whether Ray at {gcs_address} asks for a token: {error.code().name}") from error
    finally:
        channel.close()
    return True


def _as_it_is(message: bytes) -> bytes:
    return message


def _initialise(**options: Any) -> None:
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True, **options)
    except Exception as error:
        # NOTE: of a node that does not come up in time Ray tells by a bare Exception.
        if type(error) is not Exception and not isinstance(error, (RayError, ConnectionError, OSError, RuntimeError, ValueError)):
            raise
        raise ClusterError(f"Ray did not start: {error}", param="ray") from error
