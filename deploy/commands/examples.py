"""The examples below a command's help, as `--help` draws them."""

from __future__ import annotations


def examples(*pairs: tuple[str, str]) -> str:
    """Each pair is what somebody wants, and what they type for it."""
    lines = [f"[dim]{_escaped(wanted)}[/dim]\n  {_escaped(typed)}" for wanted, typed in pairs]
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
