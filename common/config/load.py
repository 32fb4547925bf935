"""From a file, the environment and the command line to the tree. The only module that reads `os.environ` for configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from common.config.source import ConfigSource, Problem, find_problems, in_order, keys_given_twice, read_source
from common.config.tree import Config
from common.errors import ConfigError

_ENVIRONMENT_PREFIX = "PDSERVE_"
_ENVIRONMENT_RESERVED = frozenset({"PDSERVE_HOME", "PDSERVE_CLUSTER_ID", "PDSERVE_CLUSTER_TOKEN", "PDSERVE_RAY_NODE"})


@dataclass(frozen=True, slots=True)
class CheckedConfig:
    """A file as it was read: either `config`, or everything that is wrong with it."""

    source: ConfigSource
    config: Config | None
    problems: tuple[Problem, ...]


def load_config(path: Path, *, overrides: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> Config:
    """Reads, overlays and validates. `overrides` are `dotted.key=value` strings with YAML values. Raises ConfigError."""
    checked = check_config(path, overrides=overrides, environment=environment)
    if checked.config is not None:
        return checked.config
    first, *others = checked.problems
    more = f" (and {len(others)} more; `pdserve config check` shows them)" if others else ""
    raise ConfigError(first.line + more, param=first.key)


def check_config(path: Path, *, overrides: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> CheckedConfig:
    """Like `load_config`, for whoever wants to know everything: raises ConfigError only for what cannot be read at all."""
    variables = {
        name: value
        for name, value in environment.items()
        if name.startswith(_ENVIRONMENT_PREFIX) and name not in _ENVIRONMENT_RESERVED
    }
    source = read_source(path, overrides, variables, prefix=_ENVIRONMENT_PREFIX)
    doubled = keys_given_twice(source)
    try:
        config = Config.model_validate(source.raw)
    except ValidationError as error:
        return CheckedConfig(source, None, in_order((*doubled, *find_problems(Config, source, error))))
    return CheckedConfig(source, None if doubled else config, in_order(doubled))


def pdserve_home(environment: Mapping[str, str] = os.environ) -> Path:
    """Where models and the state of running clusters live: $PDSERVE_HOME or ~/.cache/pdserve."""
    return Path(environment.get("PDSERVE_HOME") or Path.home() / ".cache" / "pdserve")
