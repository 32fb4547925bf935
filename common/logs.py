"""Structured logs: one line per event, with the process, the worker and, inside a request, its id. Never prompts or outputs.

`configure_logging` is called once per process, at its entry point; modules take `get_logger(__name__)`. JSON off a terminal,
aligned text on one; and JSON in a file if the configuration names a folder (`common.log_files`). What libraries log through
Python's own `logging` from warnings up, and an exception that ends the process, become lines like all others. What is bound
to a piece of work, such as its request id, lives in a context variable, so that it follows the work through tasks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import structlog

from common.config import LoggingConfig
from common.log_files import LogFile

# One variable of ours: those of structlog are found by going through all variables of the context, for each line and binding.
_bound: ContextVar[Mapping[str, str]] = ContextVar("bound to log lines", default={})  # noqa: B039  # nobody writes into it


def configure_logging(config: LoggingConfig, *, process: str) -> None:
    """`process` names this process in every line, e.g. "router" or a worker id with its incarnation."""
    as_json = config.format == "json" or (config.format == "auto" and not sys.stderr.isatty())
    file, complaint = _open_file(config, process)
    to_json = structlog.processors.JSONRenderer()
    rendering: list[structlog.types.Processor] = [to_json] if as_json else [structlog.dev.ConsoleRenderer()]
    if file is not None:
        rendering = [to_json, _keeps_in(file)] if as_json else [_renders_and_keeps_in(file, to_json), *rendering]
    structlog.configure(
        processors=[
            _adds_bound,
            _names_process(process),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            *rendering,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, config.level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),  # a line is one write
        cache_logger_on_first_use=True,
    )
    _take_over_from_libraries()
    sys.excepthook = _on_uncaught
    if complaint:
        get_logger(__name__).warning("no log file", reason=complaint)


def _open_file(config: LoggingConfig, process: str) -> tuple[LogFile | None, str]:
    """The file, if there is to be one; and why there is none although there should be."""
    if config.folder is None or config.max_file_bytes == 0:
        return None, ""
    try:
        file = LogFile(Path(config.folder), process, max_bytes=config.max_file_bytes)
    except OSError as error:
        return None, f"cannot write to {config.folder}: {error.strerror}"
    file.catch_crashes()
    return file, ""


def _keeps_in(file: LogFile) -> structlog.types.Processor:
    """After the rendering."""

    def keep(logger: object, method: str, line: Any) -> str:
        file.write(line)
        return cast(str, line)

    return keep


def _renders_and_keeps_in(file: LogFile, render: structlog.processors.JSONRenderer) -> structlog.types.Processor:
    """Before a rendering of another kind."""

    def keep(logger: Any, method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
        file.write(cast(str, render(logger, method, dict(event))))
        return event

    return keep


class _FromLibraries(logging.Handler):
    """Records of Python's own logging become lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def _take_over_from_libraries() -> None:
    root = logging.getLogger()
    if not any(isinstance(handler, _FromLibraries) for handler in root.handlers):
        root.addHandler(_FromLibraries(logging.WARNING))


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        get_logger(__name__).critical("the process ends by an exception", exc_info=(kind, error, trace))


def _adds_bound(logger: object, method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    return {**_bound.get(), **event}


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
def bound(**fields: str) -> Iterator[None]:
    """Adds the fields to every line logged inside, also by tasks started there."""
    before = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(before)
