"""Is what pdserve is built on there, in versions that fit: Python, packages, a compiler, a GPU's driver. Imports none of it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from common.config import Config
from deploy.diagnosis.finding import Finding, Severity

_AREA = "software"
_SHOWN = ("torch", "ray", "grpcio", "protobuf")  # by themselves; of the others only what is wrong
_DRIVER = Path("/proc/driver/nvidia/version")


def check_software(config: Config | None) -> Iterator[Finding]:
    """`config` says which extras are needed beyond those of every worker."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Finding(_AREA, "python", version, Severity.OK if good else Severity.FAILURE, advice="" if good else "use 3.11 or later")
    yield from _packages(config)
    yield _compiler(config)
    yield _gpu()


def _packages(config: Config | None) -> Iterator[Finding]:
    needed = {"", "engine", "ray", *(extras_of(config) if config is not None else ())}
    fitting = 0
    for extra, requirement in requirements():
        problem, found = _problem(requirement)
        name = requirement.name
        if problem and extra in needed:
            advice = f"pip install 'pdserve[{extra}]'" if extra else "install pdserve anew"
            yield Finding(_AREA, name, problem, Severity.FAILURE, advice=advice)
        elif problem and extra == "nixl":
            means = "only for RDMA and NVLink; shm and tcp work without it"
            yield Finding(_AREA, name, problem, Severity.NOTE, means, f"pip install 'pdserve[{extra}]'")
        elif name in _SHOWN:
            yield Finding(_AREA, name, found)
        elif not problem and extra in needed:
            fitting += 1
    yield Finding(_AREA, "packages", f"{fitting} more, all in versions that fit")


def requirements() -> Iterator[tuple[str, Requirement]]:
    """What the distribution says that it needs, with the extra that it is for ("" for all)."""
    for text in metadata.requires("pdserve") or ():
        requirement = Requirement(text)
        extra = re.search(r"""extra == ['"]([^'"]+)['"]""", text)
        if extra is None and (requirement.marker is None or requirement.marker.evaluate()):
            yield "", requirement
        elif extra is not None and requirement.marker is not None and requirement.marker.evaluate({"extra": extra[1]}):
            yield extra[1], requirement


def extras_of(config: Config) -> set[str]:
    """The extras that this configuration cannot do without."""
    found = set()
    if config.cache.redis.url is not None:
        found.add("redis")
    if config.transfer.transports == ("nixl",):
        found.add("nixl")
    if config.wants_minilm:
        found.add("embed")
    if config.tracing.otlp_endpoint is not None:
        found.add("otel")
    return found


def _problem(requirement: Requirement) -> tuple[str, str]:
    """What is wrong with an installed package, if anything; and its version."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"not installed; {requirement.name}{requirement.specifier} is needed", ""
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version}; {requirement.specifier} is needed", version
    return "", version


def _compiler(config: Config | None) -> Finding:
    from common.engine.native.build import COMPILERS, find_compiler

    found = find_compiler()
    if found is not None:
        return Finding(_AREA, "C++ compiler", found)
    wanted = config is not None and any(model.engine.kernels == "native" for model in config.models)
    return Finding(
        _AREA,
        "C++ compiler",
        f"none of {', '.join(COMPILERS)}",
        Severity.FAILURE if wanted else Severity.NOTE if _DRIVER.exists() else Severity.WARNING,
        "on a CPU native kernels are several times as fast as torch; they are compiled on the machine that they run on",
        "install g++",
    )


def _gpu() -> Finding:
    if not _DRIVER.exists():
        return Finding(_AREA, "GPU", "no NVIDIA driver: computes on the CPU")
    line = _DRIVER.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    version = re.search(r"\d+\.\d+(\.\d+)?", line)
    tool = shutil.which("nvidia-smi")
    return Finding(
        _AREA, "GPU", f"NVIDIA driver {version[0] if version else 'of unknown version'}" + ("" if tool else ", no nvidia-smi")
    )
