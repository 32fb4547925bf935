"""Structured logs: one line per event, with the process, the worker and, inside a request, its id. Never prompts or outputs.

`configure_logging` is called once per process, at its entry point; modules take `get_logger(__name__)`. JSON off a terminal,
aligned text on one. The request id lives in a context variable, so that it follows a request through tasks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from common.config import LoggingConfig


def configure_logging(config: LoggingConfig, *, process: str) -> None:
    """`process` names this process in every line, e.g. "router" or a worker id."""
    as_json = config.format == "json" or (config.format == "auto" and not sys.stderr.isatty())
    renderer: structlog.types.Processor = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _names_process(process),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _names_process(process: str) -> structlog.types.Processor:
    # Not a context variable: lines from threads of ours, which start with an empty context, carry it too.
    def add(logger: object, method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        event["process"] = process
        return event

    return add


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(module=name)
    return logger


@contextmanager
def bind_request(request_id: str) -> Iterator[None]:
    """Adds the request id to every line logged inside, also by tasks started there."""
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        yield
