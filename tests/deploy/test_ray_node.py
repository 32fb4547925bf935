"""How a host's Ray is started."""

from __future__ import annotations

import argparse
import json

import pytest

from deploy.ray_environment import node_variables
from deploy.ray_node import own_address, ray_start, slots_from

SLOTS = dict([slots_from("10.0.0.11=prefill:2,decode:1"), slots_from("10.0.0.12=decode:3")])


def test_a_worker_offers_the_slots_of_its_address_and_no_others() -> None:
    command = ray_start("worker", "10.0.0.11", SLOTS, head="10.0.0.10")
    assert "--address=10.0.0.10:6379" in command
    assert "--node-ip-address=10.0.0.11" in command
    (resources,) = (item.partition("=")[2] for item in command if item.startswith("--resources"))
    assert json.loads(resources) == {"prefill": 2, "decode": 1}
    elsewhere = ray_start("worker", "10.0.0.99", SLOTS, head="10.0.0.10")
    assert not [item for item in elsewhere if item.startswith("--resources")], "what a provider's node type says stands"


def test_the_head_is_started_with_the_autoscaler_that_ray_up_configured() -> None:
    command = ray_start("head", "10.0.0.10", {}, head=None)
    assert "--head" in command
    assert any(item.startswith("--autoscaling-config=/") for item in command)
    assert command[0].endswith("/ray"), "a login shell has a PATH of its own"


def test_ray_asks_for_a_token_on_every_node() -> None:
    for version in (True, False):
        variables = node_variables(autoscaler_v2=version)
        assert variables["RAY_AUTH_MODE"] == "token"
        assert variables["RAY_enable_autoscaler_v2"] == ("1" if version else "0")


@pytest.mark.parametrize("text", ["10.0.0.11", "10.0.0.11=", "10.0.0.11=prefill", "10.0.0.11=prefill:x", "10.0.0.11=teacher:1"])
def test_slots_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected ADDRESS=prefill:N"):
        slots_from(text)


def test_the_own_address_is_the_one_from_which_the_peer_is_reached() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
