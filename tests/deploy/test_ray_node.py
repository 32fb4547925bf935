"""How a host's Ray is started."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from deploy import ray_node
from deploy.janitor import members
from deploy.node_guard import MARK_VARIABLE
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


# Fails the given number of times, and leaves a process each time; the last try leaves one, too.
STARTING = """
import pathlib, subprocess, sys
tries = pathlib.Path(sys.argv[1])
count = int(tries.read_text() or 0) + 1
tries.write_text(str(count))
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
sys.exit(0 if count > int(sys.argv[2]) else 7)
"""


@pytest.mark.parametrize(("failures", "tries", "status"), [(0, 1, None), (2, 3, None), (9, 3, 7)])
def test_a_start_that_fails_is_tried_again_over_nothing(tmp_path: Path, failures: int, tries: int, status: int | None) -> None:
    counted, mark = tmp_path / "tries", uuid.uuid4().hex
    counted.write_text("")
    command = [sys.executable, "-c", STARTING, str(counted), str(failures)]
    try:
        if status is None:
            ray_node._start(command, {MARK_VARIABLE: mark}, mark)
        else:
            with pytest.raises(SystemExit, match=str(status)):
                ray_node._start(command, {MARK_VARIABLE: mark}, mark)
        assert int(counted.read_text()) == tries
        assert len(members(mark, MARK_VARIABLE)) == (1 if status is None else 0)
    finally:
        for pid in members(mark, MARK_VARIABLE):
            subprocess.run(["kill", "-KILL", str(pid)], check=True)
