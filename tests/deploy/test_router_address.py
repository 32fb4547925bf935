from __future__ import annotations

from common.config import RouterConfig
from common.wire.registry_pb2 import ClusterSnapshot, RouterInfo
from deploy.router_address import RouterAddress

SNAPSHOT = ClusterSnapshot(
    routers=[
        RouterInfo(http_address="127.0.0.1:7", grpc_address="127.0.0.1:8", pid=70),
        RouterInfo(http_address="[::1]:4711", grpc_address="127.0.0.1:4712", pid=71),
    ]
)


def test_free_ports_are_kept_until_somebody_else_has_them() -> None:
    address = RouterAddress(RouterConfig(http_port=0, grpc_port=0))
    assert (address.settings(), address.forget()) == ([], False)
    address.note(SNAPSHOT, 71)
    address.note(ClusterSnapshot(), 71)  # it was killed
    assert address.settings() == ["router.http_port=4711", "router.grpc_port=4712"]
    assert (address.forget(), address.settings(), address.forget()) == (True, [], False)


def test_ports_of_the_configuration_stand_there() -> None:
    address = RouterAddress(RouterConfig(http_port=8000, grpc_port=0))
    address.note(SNAPSHOT, 71)
    assert address.settings() == ["router.grpc_port=4712"]
