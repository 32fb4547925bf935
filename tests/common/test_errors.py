"""The error tree: drawn, mapped and rebuilt without loss."""

from __future__ import annotations

import http
import inspect
import re

import grpc
import pytest

from common import errors
from common.errors import ERRORS_BY_CODE, EngineFailure, PdserveError, RequestError, error_from_code

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PdserveError)]


def test_the_drawing_holds_every_error_with_its_parent() -> None:
    drawn: dict[str, str | None] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([\s│├└─]*)([A-Z][A-Za-z]+)\b", line)
        if match is None or match[2] not in ERRORS_BY_CODE:
            continue
        depth = len(match[1])
        path = [(column, name) for column, name in path if column < depth]
        drawn[match[2]] = path[-1][1] if path else None
        path.append((depth, match[2]))
    assert drawn == {kind.__name__: kind.__base__.__name__ if kind is not PdserveError else None for kind in KINDS}


def test_the_drawn_http_statuses_are_the_mapped_ones() -> None:
    drawn = re.findall(r"([A-Z][A-Za-z]+) +(\d{3})\b", errors.__doc__ or "")
    assert len(drawn) >= 10
    assert {name: int(status) for name, status in drawn} == {name: ERRORS_BY_CODE[name].http_status for name, _ in drawn}


@pytest.mark.parametrize("kind", KINDS)
def test_each_error_maps_to_both_protocols_and_comes_back_from_the_wire(kind: type[PdserveError]) -> None:
    assert kind.grpc_code in grpc.StatusCode.__members__
    assert kind.grpc_code not in ("OK", "UNKNOWN")
    assert kind.http_status == 499 or kind.http_status in {status.value for status in http.HTTPStatus}
    sent = kind("what happened", param="field", retry_after_s=1.5)
    back = error_from_code(sent.code, sent.message, param=sent.param, retry_after_s=sent.retry_after_s)
    assert (type(back), str(back), back.param, back.retry_after_s) == (kind, "what happened", "field", 1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_error_is_never_retried_and_never_a_server_status(kind: type[PdserveError]) -> None:
    if issubclass(kind, RequestError):
        assert 400 <= kind.http_status < 500
        assert not kind.retryable
    elif kind.retryable:
        assert kind.http_status in (429, 503)


def test_an_unknown_code_from_a_newer_peer_is_an_engine_failure_that_names_it() -> None:
    back = error_from_code("FluxReversed", "oh", param="p")
    assert type(back) is EngineFailure
    assert back.message == "FluxReversed: oh"
    assert not back.retryable
