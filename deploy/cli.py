"""The entry point of `pdserve`: the command line (`deploy.app`), or, for a shell that completes a word, an answer without it."""

from __future__ import annotations

import os
import sys

from deploy.completion import ASKING_SHELL

_INTERRUPTED = 130  # as everywhere (`deploy.commands.output`), without its imports


def main() -> None:
    shell = os.environ.get(ASKING_SHELL)
    if shell is not None:
        from deploy.completion.answer import answer

        sys.stdout.write(answer(shell, sys.argv[1:]))
        return
    try:
        from deploy.app import app
    except KeyboardInterrupt:  # so soon that nothing has begun
        sys.exit(_INTERRUPTED)
    app(prog_name="pdserve")


if __name__ == "__main__":
    main()
