"""The names of what answers depend on. Each has an epoch in the store; to invalidate a name is to begin its next epoch.

    tenant:T          all answers of one API key         whoever has the key
    model:M           all answers of one model           an administrator; anybody where there are no keys
    model:M@T         one tenant's answers of a model    whoever has the key
    tag:G@T           answers asked for under a tag      whoever has the key

Tags belong to their tenant: two tenants that use the same word mean different things, and cannot reach each other's answers.
"""

from __future__ import annotations

from collections.abc import Iterable


def epoch_names(model: str, tenant: str, tags: Iterable[str]) -> tuple[str, ...]:
    """Everything that one answer depends on."""
    return (of_tenant(tenant), of_model(model), of_model(model, tenant), *(of_tag(tag, tenant) for tag in tags))


def of_tenant(tenant: str) -> str:
    return f"tenant:{tenant}"


def of_model(model: str, tenant: str | None = None) -> str:
    return f"model:{model}" if tenant is None else f"model:{model}@{tenant}"


def of_tag(tag: str, tenant: str) -> str:
    return f"tag:{tag}@{tenant}"
