"""Names of clusters, workers, models and keys, from small files alone: a key press waits neither for a cluster nor for imports.

Names of workers are those that have logged in the last run; a worker that just went is offered, one that never came is not.
"""

from __future__ import annotations

import os
from pathlib import Path

_DEFAULT_CLUSTER = "local"


def home() -> Path:
    # As `common.config.pdserve_home`, whose module takes longer to import than a key press may.
    return Path(os.environ.get("PDSERVE_HOME") or Path.home() / ".cache" / "pdserve")


def names_for(kind: str, cluster: str) -> list[str]:
    """What a parameter of this kind may be; `cluster` is the one that is named on the line, if any."""
    match kind:
        case "cluster":
            running = (path.stem for path in _entries(home() / "clusters") if path.suffix == ".json")
            logged = (path.name for path in _entries(home() / "logs") if path.is_dir())
            return sorted({*running, *logged})
        case "key":
            return _keys()
    processes = _processes(cluster)
    workers = [name for name in processes if "/" in name]
    pools = {name.rpartition("/")[0] for name in workers}
    match kind:
        case "worker":
            return sorted(workers)
        case "model":
            return sorted({name.split("/")[0] for name in workers})
        case "who":
            return sorted({*processes, *pools, *(pool.rpartition("/")[2] for pool in pools)})
        case _:
            return []


def _keys() -> list[str]:
    from common.config import Config
    from common.config.source import fields_of

    return [key for key, _ in fields_of(Config)]


def _processes(cluster: str) -> list[str]:
    from common.log_files import SUFFIX, is_older, process_of

    above = home() / "logs"
    clusters = [path.name for path in _entries(above) if path.is_dir()]
    only = clusters[0] if len(clusters) == 1 else _DEFAULT_CLUSTER
    runs = [path for path in _entries(above / (cluster or only)) if path.is_dir()]
    files = _entries(runs[-1]) if runs else []
    return [process_of(path) for path in files if path.name.endswith(SUFFIX) and not is_older(path)]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
