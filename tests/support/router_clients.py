"""The clients that drive a router under test: loopback only, no proxies, no retries behind the test's back."""

from __future__ import annotations

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from support.fake_cluster import FakeCluster
from support.plain_http import NO_CERTIFICATES


def http_client(cluster: FakeCluster, **settings: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.http_url, trust_env=False, verify=NO_CERTIFICATES, timeout=30.0, **settings)


def openai_client(cluster: FakeCluster, api_key: str = "none") -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url=f"{cluster.http_url}/v1",
        api_key=api_key,
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(trust_env=False, verify=NO_CERTIFICATES),
    )
