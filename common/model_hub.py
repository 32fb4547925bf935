"""The Hugging Face hub as the model store sees it: what a repository holds, and its files in a folder.

`ModelHub` is the seam; tests bring their own hub. The library and its network stack are imported when first used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class HubFile:
    size_bytes: int | None
    sha256: str | None  # stated for large files only


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    revision: str  # a commit: two calls that name it get the same files
    files: Mapping[str, HubFile]


class ModelHub(Protocol):
    def describe(self, repo_id: str) -> HubSnapshot:
        """The newest state of a repository. Raises ModelLoadError."""
        ...

    def download(self, repo_id: str, revision: str, names: Sequence[str], folder: Path) -> None:
        """Puts the named files into `folder`; one that an earlier try left there may be kept. Raises ModelLoadError."""
        ...


class HuggingFaceHub:
    """Endpoint and credentials are whatever the library is configured for on this machine."""

    def describe(self, repo_id: str) -> HubSnapshot:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its network library's, whichever that is

        try:
            info = HfApi().model_info(repo_id, files_metadata=True, timeout=30.0)
        except (OSError, ValueError, HTTPError) as error:
            raise _failed(repo_id, error) from error
        if info.sha is None:
            raise ModelLoadError(f"the hub states no revision for {repo_id}")
        files = {
            entry.rfilename: HubFile(size_bytes=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None)
            for entry in info.siblings or ()
        }
        return HubSnapshot(revision=info.sha, files=files)

    def download(self, repo_id: str, revision: str, names: Sequence[str], folder: Path) -> None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # its network library's, whichever that is

        try:
            snapshot_download(repo_id, revision=revision, allow_patterns=list(names), local_dir=folder)
        except (OSError, ValueError, HTTPError) as error:
            raise _failed(repo_id, error) from error


def _failed(repo_id: str, error: Exception) -> ModelLoadError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ModelLoadError(
        f"cannot fetch {repo_id} from the Hugging Face hub: {reason}. Check the name and the network, and for a gated model "
        "that HF_TOKEN is set; or name a local folder instead"
    )
