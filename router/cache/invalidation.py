"""`POST /v1/cache/invalidate`: whose answers a caller may have forgotten, and by which names the store knows them.

A key reaches what is its tenant's; of a model, an administrator reaches everybody's answers. Without keys everybody is one tenant
and may administrate.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.errors import InvalidRequest, ModelNotFound
from router.admission.tenants import Identity
from router.cache.answers import AnswerCache
from router.cache.control import checked_tags
from router.cache.names import of_model, of_tag, of_tenant
from router.registry import ModelView
from router.schemas import InvalidateBody


async def invalidate(
    body: InvalidateBody, cache: AnswerCache, *, identity: Identity, models: Iterable[tuple[str, ModelView]]
) -> dict[str, Any]:
    """The answer's body. `models` are all names that can be asked for."""
    tenant = identity.tenant.cache_salt
    names, told = [], []
    if body.tenant is not None:
        names.append(of_tenant(tenant))
        told.append("tenant:self")
    if body.model is not None:
        served = next((model.name for name, model in models if name == body.model), None)
        if served is None:
            raise ModelNotFound(f"The model {body.model!r} does not exist.", param="model")
        names.append(of_model(served) if identity.tenant.admin else of_model(served, tenant))
        told.append(f"model:{served}")
    for tag in checked_tags(body.tags, param="tags"):
        names.append(of_tag(tag, tenant))
        told.append(f"tag:{tag}")
    if body.id is not None:
        told.append(f"id:{body.id}")
    if not told:
        raise InvalidRequest("name what is to be invalidated: model, tags, tenant or id", param="tenant")
    await cache.forget(names, body.id)
    return {"object": "cache.invalidation", "invalidated": told}
