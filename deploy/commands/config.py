"""`pdserve config check | show | schema`: the configuration, without starting anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.output import errors_as_lines, out
from deploy.commands.up import DEFAULT_CONFIG

app = typer.Typer(help="Checks and explains configurations.", no_args_is_help=True)

ConfigPath = Annotated[Path, typer.Argument(help="The cluster's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the file.")]


@app.command()
def check(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Says whether the file is good, or which key on which line is not."""
    from common.config import load_config

    with errors_as_lines():
        load_config(config, overrides=overrides or ())
        out.print(f"{config}: good", markup=False)


@app.command()
def show(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Prints the configuration with every default filled in, as YAML."""
    import yaml

    from common.config import load_config

    with errors_as_lines():
        loaded = load_config(config, overrides=overrides or ())
        values = loaded.model_dump(mode="json")
        values["router"]["api_keys"] = ["(hidden)"] * len(loaded.router.api_keys)
        for name, tenant in loaded.router.tenants.items():
            values["router"]["tenants"][name]["keys"] = ["(hidden)"] * len(tenant.keys)
        out.print(yaml.safe_dump(values, sort_keys=False), markup=False, end="")


@app.command()
def schema() -> None:
    """Prints the JSON schema of the file: every key, its meaning, its default. Editors can use it."""
    from common.config import Config

    out.print_json(json.dumps(Config.model_json_schema()))
