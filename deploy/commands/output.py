"""How commands speak: results on stdout, everything else on stderr; typed errors as one line and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from common.errors import PdserveError

# Off a terminal nobody's width is known: lines stay whole, for pipes and logs.
_WIDTH = None if sys.stdout.isatty() else 240
out = Console(highlight=False, width=_WIDTH)
err = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Around a command's body: a typed error becomes one line on stderr and exit status 1."""
    try:
        yield
    except PdserveError as error:
        err.print(f"pdserve: {error.message}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
