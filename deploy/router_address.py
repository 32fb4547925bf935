"""Where a router that was started again has to listen: where clients know it, also if its ports were free ones at first.

configured 0 -> the first router takes free ports -> noted from the membership -> asked for by its successors
                                                          forgotten, if somebody else has taken them meanwhile
"""

from __future__ import annotations

from common.config import RouterConfig
from common.wire.registry_pb2 import ClusterSnapshot


class RouterAddress:
    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._ports: dict[str, str] = {}  # by setting

    def note(self, snapshot: ClusterSnapshot, pid: int) -> None:
        """The router with this process may be one of those that the manager knows."""
        for router in snapshot.routers:
            if router.pid == pid:
                found = {"http_port": router.http_address, "grpc_port": router.grpc_address}
                self._ports = {name: address.rpartition(":")[2] for name, address in found.items()}

    def settings(self) -> list[str]:
        """For the next router's command line."""
        return [f"router.{name}={port}" for name, port in self._ports.items() if getattr(self._config, name) == 0]

    def forget(self) -> bool:
        """Whether the next router is asked for less than the last one."""
        asked = bool(self.settings())
        self._ports = {}
        return asked
