"""Whose requests may read and act, on routers with keys and without."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from common.config import RouterConfig, TenantConfig
from common.errors import PermissionDenied
from router.admission.tenants import Identity, anonymous, tenants_of
from router.console.guard import check_actor, check_reader

OPEN = anonymous(RouterConfig())


def of_tenant(*, admin: bool) -> Identity:
    config = RouterConfig(tenants={"ops": TenantConfig(admin=admin, keys=("secret",))})
    return Identity(tenants_of(config)["ops"], "key")


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "127.8.9.1"])
def test_without_keys_names_of_this_machine_are_answered(host: str) -> None:
    check_reader(OPEN, Headers({"host": host}), authenticates=False)
    check_reader(OPEN, Headers({"host": host, "origin": f"http://{host}"}), authenticates=False)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "10.0.0.1:8000",
        "localhost.evil.example",
        "[::1",
        "localhost@evil.example",
    ],
)
def test_without_keys_other_names_are_not(host: str) -> None:
    with pytest.raises(PermissionDenied) as refused:
        check_reader(OPEN, Headers({"host": host}), authenticates=False)
    assert refused.value.param == "host"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8001", "http://localhost:8000", ""])
def test_without_keys_pages_of_others_are_not_answered(origin: str) -> None:
    with pytest.raises(PermissionDenied) as refused:
        check_reader(OPEN, Headers({"host": "127.0.0.1:8000", "origin": origin}), authenticates=False)
    assert refused.value.param == "origin"


def test_an_action_needs_a_header_that_other_pages_cannot_set() -> None:
    here = {"host": "127.0.0.1:8000"}
    check_actor(OPEN, Headers({**here, "x-pdserve-console": "1"}), authenticates=False)
    for headers in (here, {**here, "x-pdserve-console": "0"}):
        with pytest.raises(PermissionDenied) as refused:
            check_actor(OPEN, Headers(headers), authenticates=False)
        assert refused.value.param == "x-pdserve-console"
    with pytest.raises(PermissionDenied):
        check_actor(of_tenant(admin=True), Headers(here), authenticates=True)


def test_with_keys_the_key_decides_and_any_name_is_good() -> None:
    headers = Headers({"host": "llm.example.org", "origin": "https://llm.example.org", "x-pdserve-console": "1"})
    check_actor(of_tenant(admin=True), headers, authenticates=True)
    with pytest.raises(PermissionDenied):
        check_reader(of_tenant(admin=False), headers, authenticates=True)
