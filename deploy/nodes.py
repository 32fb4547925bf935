"""The machines of a Ray cluster, as far as placing workers goes: what a node offers, and what a worker gets of it.

A node offers slots when it was started with the resources `prefill` and `decode` (`deploy.ray_node`, or a node type of
deploy/ray/*.yaml): so many workers of a role it takes. These are plain functions over what Ray says of its nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.types import Role


@dataclass(frozen=True, slots=True)
class Node:
    node_id: str
    address: str
    alive: bool
    cpus: float
    slots: Mapping[Role, float]


def nodes_of(listed: Iterable[Mapping[str, Any]]) -> list[Node]:
    """From `ray.nodes()`."""
    return [
        Node(
            node_id=str(one["NodeID"]),
            address=str(one["NodeManagerAddress"]),
            alive=bool(one["Alive"]),
            cpus=float(one["Resources"].get("CPU", 0.0)),
            slots={role: float(one["Resources"].get(role.value, 0.0)) for role in Role},
        )
        for one in listed
    ]


def slots_of(nodes: Iterable[Node]) -> dict[Role, int]:
    """How many workers of each role the nodes that are alive take, whoever is there now."""
    alive = [node for node in nodes if node.alive]
    return {role: sum(int(node.slots[role]) for node in alive) for role in Role}


def resources_of(role: Role, *, slots: bool) -> dict[str, float]:
    """What a worker takes of its node beyond CPUs, if it is given a slot of this role."""
    return {role.value: 1.0} if slots else {}


def gpus_of(device: str, num_ranks: int) -> int:
    """GPUs that a worker has to itself. A worker of one rank has none so: prefill and decode may share one."""
    return num_ranks if device == "cuda" and num_ranks > 1 else 0


def threads_of_slot(nodes: Iterable[Node], role: Role) -> int:
    """CPU threads of a worker that takes a slot of this role: its part of the smallest node that it may be placed on."""
    shares = [node.cpus / sum(node.slots.values()) for node in nodes if node.alive and node.slots[role] >= 1]
    return max(1, int(min(shares, default=1.0)))
