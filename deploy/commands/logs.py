"""`pdserve logs`: what router, manager and workers logged, merged by time; also of a cluster that is gone."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out, say
from deploy.commands.which_cluster import ClusterName, choose_cluster
from deploy.logs.records import Level

if TYPE_CHECKING:
    from deploy.logs.records import Record, Wanted
    from deploy.logs.runs import Run

_FIRST_LINES = 20
EXAMPLES = examples(
    ("everything of the present run, or of the last one", "pdserve logs"),
    ("a worker, as it goes on; the slot, whichever process has it", "pdserve logs tiny/decode/0 -f"),
    ("what went wrong in the last quarter of an hour", "pdserve logs --level warning --since 15m"),
    ("one request, through router and workers", "pdserve logs --request 8f3c5d..."),
    ("of the run before this one, for programs", "pdserve logs --previous --json | jq .event"),
)

Who = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROCESS",
        help="A worker (tiny/decode/0), a pool (tiny/decode), a model, prefill or decode, router, manager, launcher.",
        show_default=False,
    ),
]


def logs(
    who: Who = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until the cluster ends.")] = False,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "-n", min=0, show_default=False, help="So many from the end. Default: all; 20 with -f."),
    ] = None,
    level: Annotated[Level, typer.Option(help="The least important that is shown.", case_sensitive=False)] = Level.DEBUG,
    request: Annotated[str, typer.Option(show_default=False, help="Of one request: the X-Request-Id of its answer.")] = "",
    since: Annotated[
        str, typer.Option(show_default=False, help="Not older than: 90s, 15m, 2h, 1d, 13:05 or 2026-01-31T13:05.")
    ] = "",
    previous: Annotated[bool, typer.Option("--previous", "-p", help="Of the run before the last one.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The lines as they are in the files: one JSON object each.")] = False,
    folder: Annotated[
        Path | None, typer.Option(show_default=False, help="Read this folder, if the configuration names one (logging.folder).")
    ] = None,
    cluster: ClusterName = None,
) -> None:
    """Shows what router, manager and workers logged, merged by time.

    Works while workers come and go, and after the cluster has ended: the last runs are kept (logging.keep_runs).
    """
    with errors_as_lines():
        from deploy.logs.reading import follow as follow_run
        from deploy.logs.reading import history

        wanted = _wanted(who, level, request, since)
        run = _find_run(cluster, previous=previous, folder=folder)
        _check_names(run, wanted, patient=follow)
        if not run.lives:
            say(f"(the cluster does not run; these are the logs of {run.folder.name})")
        if not follow:
            _show(history(run, wanted, last=lines), run, as_json=as_json)
            return
        for batch in follow_run(run, wanted, last=_FIRST_LINES if lines is None else lines):
            _show(batch, run, as_json=as_json)
        say("(the cluster has ended)" if run.launcher_pid else "(nobody writes here any more)")


def _wanted(who: list[str] | None, level: Level, request: str, since: str) -> Wanted:
    from datetime import UTC, datetime

    from deploy.logs.records import Wanted, parse_since

    begin = parse_since(since, datetime.now(UTC)) if since else None
    return Wanted(tuple(who or ()), level, request, begin)


def _find_run(cluster: str | None, *, previous: bool, folder: Path | None) -> Run:
    from common.config import pdserve_home
    from common.errors import ClusterError
    from deploy.logs.runs import clusters_with_logs, run_in, runs_of

    if folder is not None:
        return run_in(folder)
    home = pdserve_home()
    known = clusters_with_logs(home)
    name = choose_cluster(cluster, among=known)
    runs = runs_of(home, name)
    if len(runs) < 1 + previous:
        if previous and runs:
            raise ClusterError(f"only one run of cluster {name!r} is kept")
        others = f"; there are some of: {', '.join(known)} (--cluster NAME)" if known else ""
        raise ClusterError(f"there are no logs of a cluster {name!r} on this machine{others}")
    return runs[-2 if previous else -1]


def _check_names(run: Run, wanted: Wanted, *, patient: bool) -> None:
    """A name that fits nobody is a mistake, unless somebody of that name may still come."""
    from common.errors import InvalidRequest
    from deploy.logs.reading import processes_of
    from deploy.logs.records import Wanted as Names

    there = processes_of(run)
    for name in () if patient and run.lives else wanted.processes:
        if not any(Names((name,)).takes_file(process) for process in there):
            raise InvalidRequest(f"nobody in this run is called {name!r}; there are: {', '.join(there) or 'none'}")


def _show(records: Iterable[Record], run: Run, *, as_json: bool) -> None:
    from datetime import datetime

    from deploy.logs.drawing import LogDrawing
    from deploy.logs.reading import processes_of

    if as_json:
        for record in records:
            sys.stdout.write(record.line + "\n")
    else:
        on_terminal = out.is_terminal
        width = max((len(name) for name in processes_of(run)), default=0) + len("#1")
        drawing = LogDrawing(datetime.now().astimezone().date() if on_terminal else None, process_width=width)
        for record in records:
            text = drawing.draw(record)
            if on_terminal:
                out.print(text, soft_wrap=True)
            else:
                sys.stdout.write(f"{text.plain}\n")
    sys.stdout.flush()
