"""`pdserve completion`: what a shell needs to complete commands, options, and names of clusters, workers, models and keys."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines

EXAMPLES = examples(
    ("in bash, for this shell", 'eval "$(pdserve completion bash)"'),
    ("in bash, for all that come", "pdserve completion bash > ~/.local/share/bash-completion/completions/pdserve"),
    ("in zsh, in a folder of $fpath", "pdserve completion zsh > ~/.zfunc/_pdserve"),
    ("in fish", "pdserve completion fish > ~/.config/fish/completions/pdserve.fish"),
)


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="The shell.", show_default=False)]) -> None:
    """Prints what makes a shell complete pdserve's commands, options and names."""
    from deploy.completion.scripts import SCRIPTS

    with errors_as_lines():
        sys.stdout.write(SCRIPTS[shell.value])
