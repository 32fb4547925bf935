"""`pdserve keys new | hash`: API keys for a router, and the entries under which it knows them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out, say

app = typer.Typer(help="Makes API keys, and entries for those that you have.", no_args_is_help=True)

Tenant = Annotated[str, typer.Option(help="Whose key it is: a name under router.tenants.")]

NEW_EXAMPLES = examples(("a key for a tenant, and the line of the keys file for it", "pdserve keys new --tenant acme"))
HASH_EXAMPLES = examples(("a key that you have, typed unseen", "pdserve keys hash --tenant acme >> keys"))


@app.command(epilog=NEW_EXAMPLES)
def new(tenant: Tenant = "default") -> None:
    """Prints a new key on stdout, once, and the line for router.keys_file that stands for it on stderr."""
    from common.api_keys import entry_of, new_key

    with errors_as_lines():
        _check_tenant(tenant)
    key = new_key()
    say("The key is shown this once. A router accepts it when its keys file has the line")
    say(f"{tenant} {entry_of(key)}")
    out.print(key, markup=False, soft_wrap=True)


@app.command("hash", epilog=HASH_EXAMPLES)
def hash_(
    tenant: Tenant = "default",
    slow: Annotated[bool, typer.Option(help="For a key that a person made up: guessing it from the entry is made slow.")] = True,
) -> None:
    """Reads a key from a prompt, or from a pipe, and prints the line for router.keys_file that stands for it."""
    from common.api_keys import entry_of, slow_entry_of
    from common.errors import InvalidRequest

    with errors_as_lines():
        _check_tenant(tenant)
        key = (typer.prompt("Key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()).strip()
        if not key or key.startswith(("sha256:", "scrypt:")):
            raise InvalidRequest("that is no key")
        out.print(f"{tenant} {slow_entry_of(key) if slow else entry_of(key)}", markup=False, soft_wrap=True)


def _check_tenant(name: str) -> None:
    """Raises InvalidRequest for one that no configuration can name."""
    from common.config.tenants import TENANT_NAME
    from common.errors import InvalidRequest

    if not TENANT_NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no name of a tenant: 1 to 64 letters, digits, '.', '_' or '-'", param="tenant")
