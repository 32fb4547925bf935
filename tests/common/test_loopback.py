from __future__ import annotations

import pytest

from common.loopback import is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"])
def test_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "10.0.0.1", "192.0.2.1", "localhost.example", "127.0.0.1:80", "fe80::1"])
def test_others(host: str) -> None:
    assert not is_loopback(host)
