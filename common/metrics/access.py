"""Who may read a process's metrics: on loopback everybody, elsewhere who brings the token that the cluster's token gives.

The token opens metrics and nothing else, so that it may lie in a file for Prometheus; the cluster's token cannot be had from it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from common.loopback import is_loopback


def metrics_token(cluster_token: str) -> str:
    return hmac.new(cluster_token.encode(), b"pdserve-metrics-v1", hashlib.sha256).hexdigest()


def guarded(app: WSGIApplication, *, host: str, cluster_token: str) -> WSGIApplication:
    """`app` as it may be served at `host`."""
    if is_loopback(host):
        return app
    expected = f"Bearer {metrics_token(cluster_token)}".encode()

    def answer(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        given = str(environment.get("HTTP_AUTHORIZATION", "")).encode("latin-1")
        if hmac.compare_digest(given, expected):
            return app(environment, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
        return []

    return answer
