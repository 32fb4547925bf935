"""`pdserve pull`: fetches a model into the cache, with progress and a checksum."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out, say

EXAMPLES = examples(
    ("a small model, 98 MB", "pdserve pull smollm2-135m"),
    ("a model of the Hugging Face hub", "pdserve pull org/name"),
)


def pull(
    name: Annotated[
        str,
        typer.Argument(
            help="smollm2-135m, gemma3-270m, a Hugging Face repo id (org/name), a local path, or minilm, an embedder."
        ),
    ],
) -> None:
    """Fetches a model and verifies it; quick when it is there already. Prints where it is."""
    from common.config import pdserve_home
    from common.model_store import BUNDLED_EMBEDDERS, pull_embedder
    from common.model_store import pull as fetch

    with errors_as_lines():
        if name in BUNDLED_EMBEDDERS:
            out.print(str(pull_embedder(name, home=pdserve_home(), progress=say)), markup=False, soft_wrap=True)
            return
        files = fetch(name, home=pdserve_home(), progress=say)
        out.print(str(files.path), markup=False, soft_wrap=True)
