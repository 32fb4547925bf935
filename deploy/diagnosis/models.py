"""Are the files of the configured models here, and are they what was fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.config import Config
from common.errors import ModelLoadError
from common.heads_store import find_heads
from common.model_store import can_be_fetched, embedder_folder, resolve
from deploy.diagnosis.finding import Finding, Severity

_AREA = "models"


def check_models(config: Config, home: Path) -> Iterator[Finding]:
    for model in config.models:
        yield _model(model.name, model.source, home)
        if model.decode.speculation.method == "draft":
            yield _model(f"{model.name}, draft", model.decode.speculation.draft_model, home)
        if model.decode.speculation.method == "medusa":
            yield _heads(f"{model.name}, heads", model.source, model.decode.speculation.heads, home)
    if config.wants_minilm:
        try:
            yield Finding(_AREA, "embedder", str(embedder_folder("minilm", home=home)))
        except ModelLoadError as error:
            yield Finding(_AREA, "embedder", error.message, Severity.FAILURE, "questions cannot be compared")


def _heads(name: str, source: str, given: str, home: Path) -> Finding:
    try:
        path = Path(given) if given else find_heads(home, resolve(source, home=home).digest())
    except ModelLoadError as error:
        return Finding(_AREA, name, error.message, Severity.NOTE, "which heads belong to it is not known before it is here")
    if path is None or not path.is_file():
        found, advice = f"there is no {path}" if given else "there are none", f"pdserve train-heads {source}"
        return Finding(_AREA, name, found, Severity.FAILURE, "its decode workers cannot start", advice)
    return Finding(_AREA, name, str(path))


def _model(name: str, source: str, home: Path) -> Finding:
    try:
        files = resolve(source, home=home)
        size_bytes = sum(file.stat().st_size for file in files.weights)
        digest = files.digest()
    except ModelLoadError as error:
        if can_be_fetched(source):
            return Finding(
                _AREA, name, error.message, Severity.NOTE, "`pdserve up` fetches it before anything starts, which takes a while"
            )
        return Finding(_AREA, name, error.message, Severity.FAILURE, "its workers cannot start")
    return Finding(_AREA, name, f"{files.kind}, {size_bytes / 2**20:,.0f} MiB, sha256 {digest[:12]}, {files.path}")
