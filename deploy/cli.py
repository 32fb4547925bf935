"""The entry point of `pdserve`: the command line (`deploy.app`), or, for a shell that completes a word, an answer without it."""

from __future__ import annotations

import os
import sys

from deploy.completion import ASKING_SHELL


def main() -> None:
    shell = os.environ.get(ASKING_SHELL)
    if shell is not None:
        from deploy.completion.answer import answer

        sys.stdout.write(answer(shell, sys.argv[1:]))
        return
    from deploy.app import app

    app(prog_name="pdserve")


if __name__ == "__main__":
    main()
