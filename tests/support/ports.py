"""A port that is free now and stays free while nobody binds it by name: one that the kernel gives to nobody who asks for any."""

from __future__ import annotations

import os
import random
import socket

_LOWEST, _HIGHEST = 12_000, 30_000  # below Linux' ip_local_port_range, above what services are known by


def quiet_port() -> int:
    """For a server that has to come back where it was."""
    draw = random.Random(os.urandom(8))
    for _ in range(100):
        port = draw.randint(_LOWEST, _HIGHEST)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise AssertionError("a hundred ports in a row are taken")
