"""Programs of others that run beside the router, on this host and for it alone: a Redis for its caches, a Prometheus.

They are children of the launcher, listen on a socket file or on loopback, and are started again when they end. What they are
started with is made here; `deploy.launcher` keeps them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from common.config import Config
from common.errors import ConfigError
from deploy.scraping import CONFIG_FILE

_REDIS_SOCKET = "redis.sock"


@dataclass(frozen=True, slots=True)
class HeadService:
    name: str
    command: tuple[str, ...]
    router_settings: tuple[str, ...] = ()  # what the router is told of it, as for --set


def head_services(config: Config, *, run_folder: Path, scraping: Path) -> list[HeadService]:
    """`run_folder` is short and goes with the cluster; `scraping` as `deploy.scraping` made it. Raises ConfigError if a program
    is not there."""
    services = []
    if config.head.redis:
        socket = run_folder / _REDIS_SOCKET
        services.append(
            HeadService(
                "redis",
                (
                    _program("redis-server", "head.redis"),
                    *("--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--dir", str(run_folder)),
                    # A cache: nothing of it is worth keeping beyond this run, and what does not fit makes room.
                    *("--save", "", "--appendonly", "no"),
                    *("--maxmemory", str(config.cache.max_bytes), "--maxmemory-policy", "allkeys-lru"),
                    *("--logfile", str(run_folder / "redis.log")),
                    # NOTE: its title would be written over its environment, by which the janitor knows it.
                    *("--set-proc-title", "no"),
                ),
                router_settings=("head.redis=false", f"cache.redis.url=unix://{socket}"),
            )
        )
    if config.head.prometheus_port is not None:
        services.append(
            HeadService(
                "prometheus",
                (
                    _program("prometheus", "head.prometheus_port"),
                    f"--config.file={scraping / CONFIG_FILE}",
                    f"--storage.tsdb.path={scraping / 'data'}",
                    f"--web.listen-address=127.0.0.1:{config.head.prometheus_port}",
                    "--log.level=warn",
                ),
            )
        )
    return services


def _program(name: str, setting: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"{setting}: there is no {name} in the PATH", param=setting)
    return path
