"""Are the ports that the configuration names to be had, and if not, who has them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from common.config import RouterConfig
from deploy.diagnosis.finding import Finding, Severity

_AREA = "ports"
_LISTENING = "0A"  # in /proc/net/tcp


def check_ports(router: RouterConfig, *, ours: frozenset[int]) -> Iterator[Finding]:
    """`ours` are ports that a cluster of this very configuration listens on already."""
    for what, host, port in (("HTTP", router.http_host, router.http_port), ("gRPC", router.grpc_host, router.grpc_port)):
        if port == 0:
            yield Finding(_AREA, what, "any free one")
        elif port in ours:
            yield Finding(_AREA, what, f"{host}:{port}, where this cluster listens")
        else:
            yield _try(what, host, port)


def _try(what: str, host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what only lingers is no obstacle
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            advice = f"another port: --set router.{what.lower()}_port=0 takes a free one"
            if error.errno == errno.EADDRINUSE:
                found = f"{host}:{port} is taken by {holder(port) or 'another process'}"
            else:
                found = f"{host}:{port} cannot be had: {error.strerror or error}"
                if error.errno == errno.EACCES:
                    advice = f"ports below 1024 need rights; {advice}"
            return Finding(_AREA, what, found, Severity.FAILURE, "the router cannot start", advice)
    return Finding(_AREA, what, f"{host}:{port} is free")


def holder(port: int) -> str | None:
    """Pid and name of who listens on a port, as far as this user may see it."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if any(os.readlink(link) in inodes for link in (entry / "fd").iterdir()):
                return f"{(entry / 'comm').read_text(encoding='utf-8', errors='replace').strip()} (pid {entry.name})"
        except OSError:
            continue  # gone, or somebody else's
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]
