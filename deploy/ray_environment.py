"""Everything that pdserve knows about Ray's settings and traps, in one place. No other file sets a Ray variable.

A private cluster is one that `pdserve up` starts for itself: on loopback only, with an own token, folder and ports, so that it
can neither be joined by accident nor join another. A joined cluster is somebody else's: its settings are left alone. A node of
one that `ray up` makes for us is started by `deploy.ray_node` with `node_variables`.

This module does not import Ray, and must not: Ray reads its variables when it is imported, so they are set before.
"""

from __future__ import annotations

import secrets
from typing import Any

CLUSTER_ID_VARIABLE = "PDSERVE_CLUSTER_ID"


_OF_EVERY_NODE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Every actor of ours has an own environment and so an own process: idle ones made in advance are never used.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # Ray would kill a worker because some other program filled the machine's memory; ours is allocated at the start.
    "RAY_memory_monitor_refresh_ms": "0",
    # NOTE: Ray's default is 15: whatever else runs on the host would have the cores of a worker whenever it likes.
    "RAY_worker_niceness": "0",
    # NOTE: without this an actor that asks Ray for no GPU sees none. Prefill and decode share a GPU on a small machine.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def namespace_of(cluster: str) -> str:
    """Names of actors are unique per namespace: clusters of different names may share one Ray."""
    return f"pdserve-{cluster}"


def private_cluster_variables(cluster_id: str) -> dict[str, str]:
    """For the environment of the process that starts Ray, before it imports it; all its children inherit them."""
    return {
        # How the janitor recognises what belongs to this cluster.
        CLUSTER_ID_VARIABLE: cluster_id,
        # NOTE: Ray's processes write their title over their environment, and the id may be in that part of it.
        "SPT_NOENV": "1",
        # NOTE: with the mode unset, a head turns authentication on only if a token file happens to exist.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # NOTE: Ray replaces a node address of 127.0.0.1 by one that others can reach, and then listens on every interface.
        # Told that it cannot form clusters (its default off Linux), it keeps to loopback in all its processes.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A fixed port by default: of two clusters on one machine only the first would get it.
        "AUTOSCALER_METRIC_PORT": "0",
        **_OF_EVERY_NODE,
        "GRPC_VERBOSITY": "ERROR",  # a connection that ends is not worth a line in between of ours
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
    }


def joining_variables(cluster_id: str) -> dict[str, str]:
    """For the process that joins a Ray, before it imports it."""
    return {
        CLUSTER_ID_VARIABLE: cluster_id,
        "SPT_NOENV": "1",
        "GRPC_VERBOSITY": "ERROR",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
        # NOTE: the autoscaler tells a driver every second that a worker waits for room, with a traceback.
        "RAY_SCHEDULER_EVENTS": "0",
    }


def node_variables(*, autoscaler_v2: bool) -> dict[str, str]:
    """For `ray start` on a host of a cluster of several; what runs on the node inherits them."""
    return {
        # NOTE: with the mode unset, a head turns authentication on only if a token file exists, and a joiner that has none is
        # refused without a reason. The token is in ~/.ray/auth_token, where `ray up` brings it.
        "RAY_AUTH_MODE": "token",
        # NOTE: version 2 never started a worker of the provider `local`.
        "RAY_enable_autoscaler_v2": "1" if autoscaler_v2 else "0",
        "SPT_NOENV": "1",
        # NOTE: a busy host that has not registered with the head by then is not tried again.
        "RAY_raylet_start_wait_time_s": "120",
        **_OF_EVERY_NODE,
    }


def actor_environment(cluster_id: str, *, threads: int | None) -> dict[str, Any]:
    """Ray's `runtime_env` of one actor. `threads` None leaves thread counts to the libraries."""
    variables = {CLUSTER_ID_VARIABLE: cluster_id}
    if threads is not None:
        # NOTE: Ray sets OMP_NUM_THREADS to the actor's num_cpus (1 for ours), whatever the engine was promised.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
            variables[name] = str(threads)
        # Threads that spin between steps would take the cores of the neighbour worker.
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
        variables["TOKENIZERS_PARALLELISM"] = "false"
    return {"env_vars": variables}
