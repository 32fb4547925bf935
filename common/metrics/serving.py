"""A process's metrics over HTTP: on a port of its own, from a thread, to whoever may read them (`common.metrics.access`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, generate_latest

from common.metrics.access import guarded

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not news."""


def _app(registry: CollectorRegistry) -> WSGIApplication:
    # Not prometheus_client.make_wsgi_app: to whoever prefers OpenMetrics, as Prometheus does, it spells vllm: as vllm_.
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", METRICS_TYPE)])
        return [generate_latest(registry)]

    return answer


def start_metrics_server(registry: CollectorRegistry, host: str, *, cluster_token: str) -> tuple[str, Callable[[], None]]:
    """Serves the registry on a free port from a thread, to whom `common.metrics.access` lets. Returns its "host:port" and what
    stops it (blocks up to 0.1 s)."""
    # Not prometheus_client.start_http_server: it takes half a second to stop.
    app = guarded(_app(registry), host=host, cluster_token=cluster_token)
    server = make_server(host, 0, app, MetricsServer, _QuietHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5.0)

    return f"{host}:{server.server_port}", stop
