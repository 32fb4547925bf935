"""Who may look and who may act: an administrator's key, or, on a router without keys, a page that this router itself has served.

A router without keys listens on loopback only, but so does everything that a browser on this machine shows. A foreign page could
send a form here (CSRF), or have its own name lead to this address and then read answers (DNS rebinding). So without keys the Host
of a request must be a name of this machine, and its Origin, if it has one, must be that Host. Actions also need a header, with
keys and without: no page of another origin can set one without being allowed to, and nobody is.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers

from common.errors import PermissionDenied
from common.loopback import is_loopback
from router.admission.tenants import Identity

ACTION_HEADER = "x-pdserve-console"


def check_reader(identity: Identity, headers: Headers, *, authenticates: bool) -> None:
    """Raises PermissionDenied."""
    identity.require_admin()
    if authenticates:
        return  # a browser sends a key only where the page that knows it says so
    host = headers.get("host", "")
    if not _is_this_machine(host):
        raise PermissionDenied("a router without API keys answers to a name of its own machine only", param="host")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise PermissionDenied("the page that asks was not served by this router", param="origin")


def check_actor(identity: Identity, headers: Headers, *, authenticates: bool) -> None:
    """Raises PermissionDenied."""
    check_reader(identity, headers, authenticates=authenticates)
    if headers.get(ACTION_HEADER) != "1":
        raise PermissionDenied(f"an action needs the header {ACTION_HEADER}: 1", param=ACTION_HEADER)


def _is_this_machine(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)
