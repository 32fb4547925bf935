"""`pdserve`, the command line: up, down, status, doctor, scale, drain, flip, roll, autoscaler, chat, pull, config, keys, route,
version. Imports are late."""

from __future__ import annotations

from importlib.metadata import version as distribution_version

import typer

from deploy.commands import config, keys, route
from deploy.commands.chat import chat
from deploy.commands.control import down, scale, status
from deploy.commands.doctor import doctor
from deploy.commands.fleet import autoscaler, drain, flip, roll
from deploy.commands.models import pull
from deploy.commands.output import out
from deploy.commands.up import up

app = typer.Typer(
    name="pdserve",
    help="Serves language models with prefill and decode on separate pools.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
for command in (up, down, status, doctor, scale, drain, flip, roll, autoscaler, chat, pull):
    app.command()(command)
app.add_typer(config.app, name="config")
app.add_typer(keys.app, name="keys")
app.add_typer(route.app, name="route")


@app.command()
def version() -> None:
    """Prints the version."""
    out.print(distribution_version("pdserve"), markup=False)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
