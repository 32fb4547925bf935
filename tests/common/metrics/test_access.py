"""Metrics on loopback are for everybody, elsewhere for who brings the token."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, make_wsgi_app

from common.metrics.access import guarded, metrics_token


def status(host: str, **headers: str) -> str:
    """What a scrape gets from the app as it is served at `host`."""
    said: list[str] = []
    environment: dict[str, Any] = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": "", **headers}
    app = guarded(make_wsgi_app(CollectorRegistry()), host=host, cluster_token="secret")
    list(app(environment, lambda line, _headers, _error=None: said.append(line)))  # type: ignore[arg-type, return-value, func-returns-value]
    return said[0]


def test_on_loopback_no_token_is_asked_for() -> None:
    assert status("127.0.0.1") == "200 OK"


@pytest.mark.parametrize(
    "given", ["", "Bearer ", "Bearer secret", f"Basic {metrics_token('secret')}", f"Bearer {metrics_token('other')}"]
)
def test_elsewhere_nothing_else_than_the_metrics_token_opens_them(given: str) -> None:
    assert status("10.0.0.11", HTTP_AUTHORIZATION=given) == "401 Unauthorized"


def test_the_metrics_token_opens_them() -> None:
    assert status("10.0.0.11", HTTP_AUTHORIZATION=f"Bearer {metrics_token('secret')}") == "200 OK"
