"""`pdserve config check | show | explain | schema`: the configuration, without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands.examples import examples
from deploy.commands.output import FAILED, complain, err, errors_as_lines, out
from deploy.commands.up import DEFAULT_CONFIG

if TYPE_CHECKING:
    from common.config.source import Problem

app = typer.Typer(help="Checks and explains configurations.", no_args_is_help=True)

ConfigPath = Annotated[Path, typer.Argument(help="The cluster's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", show_default=False, help="Overrides a key of the file.")
]

CHECK_EXAMPLES = examples(("everything that is wrong, before a start", "pdserve config check cluster.yaml"))
SHOW_EXAMPLES = examples(
    ("every key as it will be, and where it comes from", "pdserve config show cluster.yaml"),
    ("only what is not as it would be by itself", "pdserve config show cluster.yaml --changed --set router.http_port=80"),
)
EXPLAIN_EXAMPLES = examples(
    ("one key", "pdserve config explain router.admission.room_pools"),
    ("all keys of a part", "pdserve config explain models[].decode"),
)
SCHEMA_EXAMPLES = examples(
    ("for an editor that completes and checks YAML", "pdserve config schema > pdserve.schema.json"),
    ("all keys as tables", "pdserve config schema --markdown"),
)


@app.command(epilog=CHECK_EXAMPLES)
def check(config: ConfigPath = DEFAULT_CONFIG, overrides: Overrides = None) -> None:
    """Says whether the file is good, or everything that is wrong with it: where, what, and what the key means."""
    from common.config import check_config

    with errors_as_lines():
        checked = check_config(config, overrides=overrides or ())
        if not checked.problems:
            out.print(f"{config}: good", markup=False, soft_wrap=True)
            return
        for problem in checked.problems:
            _draw_problem(problem, config)
        count = len(checked.problems)
        complain(f"{config}: {count} problem{'s' if count > 1 else ''}")
        raise typer.Exit(FAILED)


@app.command(epilog=SHOW_EXAMPLES)
def show(
    config: ConfigPath = DEFAULT_CONFIG,
    overrides: Overrides = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what somebody set, not the defaults.")] = False,
) -> None:
    """Prints the effective configuration as YAML; beside each value stands where it comes from."""
    from rich.text import Text

    from common.config import check_config, load_config
    from deploy.commands.effective_config import effective_lines

    with errors_as_lines():
        loaded = load_config(config, overrides=overrides or ())
        source = check_config(config, overrides=overrides or ()).source
        values = loaded.model_dump(mode="json")
        values["router"]["api_keys"] = ["(hidden)"] * len(loaded.router.api_keys)
        for name, tenant in loaded.router.tenants.items():
            values["router"]["tenants"][name]["keys"] = ["(hidden)"] * len(tenant.keys)
        for key in ("url", "secret"):
            if values["cache"]["redis"][key] is not None:
                values["cache"]["redis"][key] = "(hidden)"
        for line in effective_lines(values, source.origin, changed_only=changed):
            text = Text(line.text)
            if line.origin:
                text.append(f"{' ' * max(1, line.column - len(line.text))}# {line.origin}", "dim" if line.default else "cyan")
            out.print(text, soft_wrap=True)


@app.command(epilog=EXPLAIN_EXAMPLES)
def explain(
    key: Annotated[str, typer.Argument(help="A key, such as router.http_port, or a part.", show_default=False)],
) -> None:
    """Says what a key means, what it may be, and what it is if nobody sets it."""
    from rich.padding import Padding
    from rich.text import Text

    from common.config import Config
    from common.errors import InvalidRequest
    from deploy.commands.config_reference import entries, nearest

    with errors_as_lines():
        known = entries(Config)
        wanted = key.replace("[]", "")
        found = [
            one for one in known if one.key.replace("[]", "") == wanted or one.key.replace("[]", "").startswith(f"{wanted}.")
        ]
        if not found:
            close = nearest(known, key)
            raise InvalidRequest(f"there is no key {key!r}" + (f"; did you mean {close!r}?" if close else ""), param="key")
        for one in found:
            heading = Text(one.key, style="bold")
            heading.append(f"  {one.kind}", style="cyan")
            heading.append("" if one.required else f"  default {one.default}", style="dim")
            heading.append("  must be given" if one.required else "", style="yellow")
            out.print(heading, soft_wrap=True)
            if one.help:
                out.print(Padding(Text(one.help), (0, 0, 0, 4)))


@app.command(epilog=SCHEMA_EXAMPLES)
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables for people instead of JSON schema.")] = False,
) -> None:
    """Prints every key of the file, its meaning and its default: as JSON schema for editors, or as tables."""
    from common.config import Config
    from deploy.commands.config_reference import as_markdown

    with errors_as_lines():
        if markdown:
            out.print(as_markdown(Config), markup=False, soft_wrap=True, end="")
        else:
            out.print_json(Config.model_json_schema())


def _draw_problem(problem: Problem, config: Path) -> None:
    """As compilers do: the place, the line, a mark below it, and what the key is for."""
    from rich.padding import Padding
    from rich.text import Text

    where = f"{config}:{problem.place.line}:{problem.place.column}" if problem.place else problem.origin
    line = Text(f"{where}: ", style="bold")
    line.append(problem.message, style="red")
    if problem.suggestion:
        line.append(f"; {problem.suggestion}", style="green")
    err.print(line, soft_wrap=True)
    text = _line_of(config, problem)
    if text is not None and problem.place is not None:
        err.print(f"    {text}", markup=False, style="dim", soft_wrap=True)
        err.print(f"    {' ' * (problem.place.column - 1)}^", style="red", soft_wrap=True)
    if problem.help:
        err.print(Padding(Text(problem.help), (0, 0, 0, 4)))


def _line_of(config: Path, problem: Problem) -> str | None:
    if problem.place is None:
        return None
    lines: list[Any] = config.read_text(encoding="utf-8", errors="replace").splitlines()
    return str(lines[problem.place.line - 1]).replace("\t", " ") if problem.place.line <= len(lines) else None
