from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from common.tokenizer import Tokenizer
from support.fake_cluster import FakeCluster, fake_cluster, make_tokenizer_folder
from support.router_clients import http_client, openai_client

StartCluster = Callable[..., AbstractAsyncContextManager[FakeCluster]]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer.load(model_path)


@pytest.fixture
def start_cluster(tokenizer: Tokenizer, model_path: Path) -> StartCluster:
    def start(**settings: Any) -> AbstractAsyncContextManager[FakeCluster]:
        return fake_cluster(tokenizer, model_path, **settings)

    return start


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> AsyncIterator[FakeCluster]:
    async with start_cluster() as running:
        yield running


@pytest.fixture
async def http(cluster: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(cluster) as client:
        yield client


@pytest.fixture
async def openai(cluster: FakeCluster) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client(cluster) as client:
        yield client
