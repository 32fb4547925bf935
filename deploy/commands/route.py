"""`pdserve route`: which model a request would go to, and why."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out
from deploy.commands.which_cluster import ClusterName

_TIMEOUT_S = 30.0
EXPLAIN_EXAMPLES = examples(
    ("a request in a file", "pdserve route explain request.json"),
    (
        "one that is typed, with a header",
        'echo \'{"model": "auto", "prompt": "hi"}\' | pdserve route explain - --header x-tier=premium',
    ),
)

app = typer.Typer(help="Which model answers a request.", no_args_is_help=True)


@app.callback()
def route() -> None:
    """Which model answers a request."""


@app.command(epilog=EXPLAIN_EXAMPLES)
def explain(
    file: Annotated[
        str, typer.Argument(help="A request as for /v1/chat/completions or /v1/completions, in JSON; - reads stdin.")
    ],
    header: Annotated[list[str] | None, typer.Option(help="A header of the request, name=value; as often as wanted.")] = None,
    url: Annotated[str | None, typer.Option(help="Address of a router; that of the local cluster by default.")] = None,
    cluster: ClusterName = None,
) -> None:
    """Prints who would answer, in which order and why, and who would not. Nothing is generated."""
    import httpx

    from common.errors import InvalidRequest, NoWorkerAvailable
    from deploy.commands.chat import router_of

    with errors_as_lines():
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
            body = json.loads(text)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{file} holds no request in JSON: {error}", param="file") from None
        headers = dict(_pair(item) for item in header or ())
        if key := os.environ.get("OPENAI_API_KEY"):
            headers.setdefault("Authorization", f"Bearer {key}")
        base_url = (url or router_of(cluster)).rstrip("/")
        try:
            answer = httpx.post(f"{base_url}/v1/route/explain", json=body, headers=headers, timeout=_TIMEOUT_S, trust_env=False)
            said: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise NoWorkerAvailable(f"no router answers at {base_url}: {error}") from None
        if answer.status_code != 200:
            raise InvalidRequest(said.get("error", {}).get("message", "the router refused the request"))
        out.print(f"{said['asked']} -> {said['model'] or 'nobody'}", markup=False)
        for candidate in said["candidates"]:
            out.print(f"  {candidate['model']}: {candidate['reason']}", markup=False, soft_wrap=True)
        for refused in said["refused"]:
            out.print(f"  not {refused['model']}: {refused['reason']}", markup=False, soft_wrap=True)


def _pair(item: str) -> tuple[str, str]:
    from common.errors import InvalidRequest

    name, separator, value = item.partition("=")
    if not separator:
        raise InvalidRequest(f"--header wants name=value, got {item!r}", param="header")
    return name, value
