"""What nodes offer, and what a worker gets of them."""

from __future__ import annotations

from typing import Any

from common.types import Role
from deploy.nodes import gpus_of, nodes_of, resources_of, slots_of, threads_of_slot


def listed(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As `ray.nodes()` has it."""
    return {"NodeID": name, "NodeManagerAddress": f"10.0.0.{len(name)}", "Alive": alive, "Resources": resources}


def test_a_node_is_read_as_ray_lists_it() -> None:
    (node,) = nodes_of([listed("ab", CPU=4.0, prefill=2.0, memory=1e9)])
    assert (node.node_id, node.address, node.alive, node.cpus) == ("ab", "10.0.0.2", True, 4.0)
    assert node.slots == {Role.PREFILL: 2.0, Role.DECODE: 0.0}


def test_a_worker_takes_one_slot_of_its_role_where_there_are_slots() -> None:
    assert resources_of(Role.DECODE, slots=True) == {"decode": 1.0}
    assert resources_of(Role.DECODE, slots=False) == {}


def test_ranks_on_gpus_have_one_each() -> None:
    asked = {(device, ranks): gpus_of(device, ranks) for device in ("cuda", "cpu", "auto") for ranks in (1, 4)}
    assert {case: gpus for case, gpus in asked.items() if gpus} == {("cuda", 4): 4}


def test_slots_are_those_of_the_nodes_that_are_alive() -> None:
    nodes = nodes_of([listed("a", prefill=2.0), listed("b", prefill=1.0, decode=3.0), listed("c", alive=False, decode=9.0)])
    assert slots_of(nodes) == {Role.PREFILL: 3, Role.DECODE: 3}
    assert slots_of([]) == {Role.PREFILL: 0, Role.DECODE: 0}


def test_workers_of_a_node_share_its_cpus_and_the_smallest_node_decides() -> None:
    nodes = nodes_of(
        [
            listed("head", CPU=2.0),
            listed("big", CPU=16.0, prefill=1.0),
            listed("mixed", CPU=8.0, prefill=1.0, decode=3.0),
            listed("gone", alive=False, CPU=1.0, prefill=1.0),
        ]
    )
    assert threads_of_slot(nodes, Role.PREFILL) == 2  # 8 CPUs for 4 workers of any role
    assert threads_of_slot(nodes, Role.DECODE) == 2
    assert threads_of_slot(nodes[:2], Role.PREFILL) == 16
    assert threads_of_slot(nodes[:1], Role.PREFILL) == 1, "no such node yet: the autoscaler may start one"
