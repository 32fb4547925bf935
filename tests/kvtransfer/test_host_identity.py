"""Whether two processes share a host, as the offer of shared memory says it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import TransferBroken
from common.types import KVLayout
from kvtransfer.host_identity import this_host
from kvtransfer.region import BlockRegion
from kvtransfer.transports.base import LinkCredentials, PeerName
from kvtransfer.transports.shm import ShmTransport

ROOT = Path(__file__).resolve().parents[2]
SAY_IT = [sys.executable, "-c", "from kvtransfer.host_identity import this_host; print(this_host())"]


def said(*before: str) -> str:
    return subprocess.run([*before, *SAY_IT], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def test_processes_of_one_host_agree() -> None:
    assert said() == this_host()
    assert "/" not in this_host(), "the offer's address goes on after a slash"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="making network namespaces needs root")
def test_another_network_namespace_is_another_host() -> None:
    assert said("unshare", "--net") != this_host()


async def test_memory_of_another_host_is_passed_over_without_a_try() -> None:
    layout = KVLayout("model", "tokenizer", 4, 2, 32, 16, "float32", True)
    with pytest.raises(TransferBroken, match="on another host"):
        await ShmTransport().connect(
            "elsewhere/pdserve-kv-x",
            LinkCredentials(PeerName("p", 1), "f", b"secret"),
            PeerName("d", 1),
            pool_blocks=1,
            layout=layout,
            source=BlockRegion(memoryview(bytearray(layout.block_bytes)), layout.block_bytes, 1),
        )
