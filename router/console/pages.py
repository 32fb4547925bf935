"""The page's files, from this package, as they are: no build step, and nothing that it loads comes from elsewhere.

They are read once, when the router starts. Browsers keep them and ask each time whether they have changed.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class _File:
    media_type: str
    content: bytes
    compressed: bytes
    tag: str

    @classmethod
    def read(cls, path: Path) -> _File:
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
        return cls(_TYPES[path.suffix], content, gzip.compress(content, mtime=0), tag)


class Pages:
    """`paths` is everything that is served, each open without a key: there is nothing of the cluster in it."""

    def __init__(self) -> None:
        found = {path.relative_to(_FOLDER).as_posix(): _File.read(path) for path in _FOLDER.rglob("*") if path.suffix in _TYPES}
        self._files: Mapping[str, _File] = {
            "/" if name == "index.html" else f"/console/{name}": file for name, file in found.items()
        }

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self._files)

    def answer(self, path: str, headers: Headers) -> Response:
        """`path` is one of `paths`."""
        file = self._files[path]
        sent = {**_HEADERS, "ETag": file.tag}
        if file.tag in headers.get("if-none-match", ""):
            return Response(status_code=304, headers=sent)
        if "gzip" in headers.get("accept-encoding", ""):
            return Response(file.compressed, media_type=file.media_type, headers={**sent, "Content-Encoding": "gzip"})
        return Response(file.content, media_type=file.media_type, headers=sent)
