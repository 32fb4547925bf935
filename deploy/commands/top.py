"""`pdserve top`: one screen that shows what the cluster does, as it does it; or the same once, or as JSON, for scripts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import complain, errors_as_lines, out
from deploy.commands.which_cluster import ClusterName

if TYPE_CHECKING:
    from deploy.top.observer import Observer
    from deploy.top.picture import Picture

_ONCE_OVER_S = 1.0  # rates need two looks
_PIPE_WIDTH = 120
EXAMPLES = examples(
    ("watch, until q", "pdserve top"),
    ("one look, for a script; the exit status is 1 if there is nothing to see", "pdserve top --once"),
    ("tokens per second of each worker", "pdserve top --once --json | jq '.workers[] | {worker_id, tokens_per_s}'"),
    ("a line of JSON every ten seconds", "pdserve top --json --interval 10 >> top.jsonl"),
)


def top(
    once: Annotated[bool, typer.Option("--once", help="One look (of a second, for rates), then end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per look, one on a line.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, metavar="SECONDS", help="Between two looks.")] = 2.0,
    cluster: ClusterName = None,
) -> None:
    """Shows what a cluster does right now: pools, workers, routers, latencies, caches, events.

    Rates are over the last interval. TTFT and TPOT are medians over the last minute, with --once over all that was counted.
    P and D are prefill and decode workers, ready and wanted. ERR/S are answers with 429 or 5xx.
    A cluster that goes away is waited for.
    """
    with errors_as_lines():
        import asyncio

        asyncio.run(_run(cluster, once=once, as_json=as_json, interval_s=interval))


async def _run(cluster: str | None, *, once: bool, as_json: bool, interval_s: float) -> None:
    import asyncio

    from deploy.top.observer import Observer
    from deploy.top.screen import Screen

    async with Observer(cluster, latency_since_start=once) as observer:
        if once:
            await observer.look()
            await asyncio.sleep(min(interval_s, _ONCE_OVER_S))
            _print(await observer.look(), as_json=as_json)
        elif as_json or not out.is_terminal:
            await _print_each(observer, as_json=as_json, interval_s=interval_s)
        else:
            await Screen(observer, out.console, interval_s).run()


async def _print_each(observer: Observer, *, as_json: bool, interval_s: float) -> None:
    """Off a terminal: one look after the other, also across a time without a cluster."""
    import asyncio

    from common.errors import PdserveError

    told = ""
    while True:
        try:
            _print(await observer.look(), as_json=as_json)
            told = ""
        except PdserveError as error:
            if error.message != told:
                complain(f"{error.message}; trying again")
            told = error.message
        await asyncio.sleep(interval_s)


def _print(picture: Picture, *, as_json: bool) -> None:
    from deploy.top.drawing import Frame, draw

    if as_json:
        sys.stdout.write(json.dumps(asdict(picture)) + "\n")
    else:
        width = out.width if out.is_terminal else _PIPE_WIDTH
        out.print(draw(picture, Frame(width, None)), width=width)
    sys.stdout.flush()
