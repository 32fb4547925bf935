"""How commands speak: results on stdout, everything else on stderr; what goes wrong as one line and an exit status.

    0     done
    1     it could not be done: a typed error, in one line with what to do (`doctor`: something should be mended)
    2     the command line is wrong (`doctor`: something stands in the way of serving)
    130   Ctrl-C

Colours are left out where NO_COLOR is set or nobody looks (a pipe, a file).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

from common.errors import PdserveError

if TYPE_CHECKING:
    from rich.console import Console

FAILED = 1
INTERRUPTED = 130
_PIPE_WIDTH = 240  # off a terminal nobody's width is known: lines stay whole, for pipes and logs


class Output:
    """One of the two streams. Its console is made when it is first used, so that nothing is imported for a usage error."""

    def __init__(self, *, stderr: bool) -> None:
        self._stderr = stderr

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        width = None if self._stderr or sys.stdout.isatty() else _PIPE_WIDTH
        return Console(stderr=self._stderr, highlight=False, width=width)

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    @property
    def width(self) -> int:
        return self.console.width

    def print(self, *objects: Any, **how: Any) -> None:
        self.console.print(*objects, **how)

    def print_json(self, data: Any) -> None:
        self.console.print_json(data=data)


out = Output(stderr=False)
err = Output(stderr=True)


def say(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


def complain(line: str) -> None:
    err.print(f"pdserve: {line}", style="red", markup=False, soft_wrap=True)


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Around a command's body: how it ends is an exit status, and never a traceback for what a user did."""
    try:
        yield
        sys.stdout.flush()
    except PdserveError as error:
        complain(error.message)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read has seen enough, as in `| head`. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
