"""What has changed between two pictures, as a JSON merge patch (RFC 7396): objects member by member, null for what is gone.

Pictures have objects with names as keys where parts come and go; a list is one value. A member that is null is as good as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Empty if nothing has changed."""
    patch: dict[str, Any] = {name: None for name in before if name not in after and before[name] is not None}
    for name, value in after.items():
        known = before.get(name)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            if part := merge_patch(known, value):
                patch[name] = part
        elif value != known:
            patch[name] = value
    return patch
