"""The commands of `pdserve`, in the order in which somebody needs them. What a command needs it imports when it runs."""

from __future__ import annotations

import typer

from deploy.commands import (
    chat,
    completion,
    config,
    doctor,
    down,
    fleet,
    keys,
    logs,
    models,
    profile,
    route,
    status,
    top,
    train_heads,
    up,
)
from deploy.commands.examples import examples
from deploy.commands.output import out

_RUN, _LOOK, _CHANGE, _SET_UP = "Run", "Look", "Change", "Set up"

app = typer.Typer(
    name="pdserve",
    epilog=examples(
        ("is this machine fit", "pdserve doctor"),
        ("start everything on this machine; Ctrl-C stops it", "pdserve up"),
        ("ask it, and see where the time went", "pdserve chat --stats"),
        ("watch it", "pdserve top"),
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for panel, command, shown in (
    (_RUN, up.up, up.EXAMPLES),
    (_RUN, down.down, down.EXAMPLES),
    (_RUN, chat.chat, chat.EXAMPLES),
    (_LOOK, status.status, status.EXAMPLES),
    (_LOOK, top.top, top.EXAMPLES),
    (_LOOK, logs.logs, logs.EXAMPLES),
    (_LOOK, doctor.doctor, doctor.EXAMPLES),
    (_LOOK, profile.profile, profile.EXAMPLES),
    (_CHANGE, fleet.scale, fleet.SCALE_EXAMPLES),
    (_CHANGE, fleet.drain, fleet.DRAIN_EXAMPLES),
    (_CHANGE, fleet.flip, fleet.FLIP_EXAMPLES),
    (_CHANGE, fleet.roll, fleet.ROLL_EXAMPLES),
    (_CHANGE, fleet.autoscaler, fleet.AUTOSCALER_EXAMPLES),
    (_SET_UP, models.pull, models.EXAMPLES),
    (_SET_UP, train_heads.train_heads, train_heads.EXAMPLES),
    (_SET_UP, completion.completion, completion.EXAMPLES),
):
    app.command(rich_help_panel=panel, epilog=shown)(command)
app.add_typer(config.app, name="config", rich_help_panel=_SET_UP)
app.add_typer(keys.app, name="keys", rich_help_panel=_SET_UP)
app.add_typer(route.app, name="route", rich_help_panel=_LOOK)


def _version_and_exit(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _main(
    _version: bool = typer.Option(False, "--version", is_eager=True, callback=_version_and_exit, help="Prints the version."),
) -> None:
    """Serves language models with prefill and decode on separate pools."""


@app.command(rich_help_panel=_SET_UP)
def version() -> None:
    """Prints the version."""
    from importlib.metadata import version as distribution_version

    out.print(distribution_version("pdserve"), markup=False)
