"""A span as the rest of the code sees it: a piece of time with a name and a place in a trace.

    span = current_span().child("queue") ... span.end()          current_span() is NO_SPAN where nobody traces
    with within(span): ...                                       it is current inside, also for tasks made there, and ends with it

Context variables carry the current span, `common.rpc` carries it to other processes. Times are readings of the process's
monotonic clock; whoever exports spans knows what they are by the wall clock. Attributes never hold prompts, answers or keys.

Neither `entered` nor `within` belongs into an async generator: whoever reads from one shares its context.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from common.logs import bound

Value = str | int | float | bool | tuple[str, ...]


class Kind(enum.Enum):
    """Who is at the other end of a span."""

    INTERNAL = "internal"  # nobody
    SERVER = "server"  # somebody who asked
    CLIENT = "client"  # somebody who is asked


class Span(Protocol):
    def __bool__(self) -> bool:
        """Whether it is one."""
        ...

    @property
    def trace_id(self) -> str:
        """Hex."""
        ...

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """What tells another process of it."""
        ...

    def child(
        self,
        name: str,
        *,
        kind: Kind = Kind.INTERNAL,
        start_s: float | None = None,
        attributes: Mapping[str, Value] | None = None,
    ) -> Span: ...

    def rename(self, name: str) -> None: ...

    def set(self, attributes: Mapping[str, Value]) -> None: ...

    def event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None: ...

    def end(self, *, at_s: float | None = None, error: str = "") -> None:
        """Once. `error` is the name of an error's class."""
        ...


class _NoSpan:
    def __bool__(self) -> bool:
        return False

    @property
    def trace_id(self) -> str:
        return ""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        return ()

    def child(
        self,
        name: str,
        *,
        kind: Kind = Kind.INTERNAL,
        start_s: float | None = None,
        attributes: Mapping[str, Value] | None = None,
    ) -> Span:
        return self

    def rename(self, name: str) -> None:
        return

    def set(self, attributes: Mapping[str, Value]) -> None:
        return

    def event(self, name: str, attributes: Mapping[str, Value] | None = None) -> None:
        return

    def end(self, *, at_s: float | None = None, error: str = "") -> None:
        return


NO_SPAN: Span = _NoSpan()
_current: ContextVar[Span] = ContextVar("span", default=NO_SPAN)


def current_span() -> Span:
    return _current.get()


@contextmanager
def entered(span: Span) -> Iterator[None]:
    """It is the current one inside, and log lines bear its trace."""
    if not span:
        yield
        return
    before = _current.set(span)
    try:
        with bound(trace_id=span.trace_id):
            yield
    finally:
        _current.reset(before)


@contextmanager
def within(span: Span) -> Iterator[Span]:
    """The same, and it ends with the body, in an error if that raises one."""
    error = ""
    try:
        with entered(span):
            yield span
    except BaseException as raised:
        error = type(raised).__name__
        raise
    finally:
        span.end(error=error)
