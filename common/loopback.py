"""Whether an address is this machine's own. What listens elsewhere has to be protected, or told that its network is trusted."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """`host` is a name or an address without a port; a name other than localhost may lead anywhere."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
