"""A settings file with what is laid over it, before and after it is validated: where each value came from, and all that is wrong.

    read_source: file, then environment, then command line -> raw tree + origins -> (validation) -> find_problems

Generic over the pydantic tree that the values are for: `common.config` owns that tree and its meaning. Nothing here reads the
process's environment; it is handed in.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.errors import ConfigError

Keys = tuple[str, ...]
_MERGE = "<<"
_LONGEST_SHOWN = 40  # characters of a wrong value
# What YAML calls the shapes that pydantic names as Python does.
_SHAPES = {
    "tuple_type": "must be a list",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "dict_type": "must be a mapping",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A spot in the file, counted from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `origin` names the place or the override that it comes from."""

    origin: str
    place: Place | None  # None if it does not come from the file
    key: str
    message: str
    suggestion: str = ""
    help: str = ""  # of the key, in its field's own words

    @property
    def line(self) -> str:
        return f"{self.origin}: {self.message}" + (f"; {self.suggestion}" if self.suggestion else "")


@dataclass(slots=True)
class ConfigSource:
    """What was read. `raw` is a tree of plain values."""

    path: Path
    node: yaml.Node
    raw: dict[str, Any]
    overlaid: dict[Keys, str] = field(default_factory=dict)  # where a value does not come from the file, by its keys

    def place(self, keys: Sequence[str]) -> Place | None:
        """Of the deepest part of `keys` that the file holds; None if it holds none of them."""
        found, _ = self._descend(keys)
        return found

    def origin(self, keys: Sequence[str]) -> str | None:
        """Where this very value was given; None if nobody gave it, so that it is a default."""
        override = self._override(keys)
        if override is not None:
            return override
        found, depth = self._descend(keys)
        return f"{self.path.name}:{found.line}" if found is not None and depth == len(keys) else None

    def blame(self, keys: Sequence[str]) -> tuple[str, Place | None]:
        """Whom to name for a mistake at or around `keys`."""
        override = self._override(keys)
        if override is not None:
            return override, None
        found, _ = self._descend(keys)
        return (f"{self.path}:{found.line}" if found else str(self.path)), found

    def overlay(self, keys: Keys, value: str, *, source: str) -> None:
        """Lays one value, in YAML, over what is there. Raises ConfigError."""
        target: Any = self.raw
        for position, key in enumerate(keys):
            last = position == len(keys) - 1
            if isinstance(target, list):
                if not key.isdigit() or int(key) >= len(target):
                    raise ConfigError(f"{source}: {key!r} is not an index into a list of {len(target)}", param=".".join(keys))
                index = int(key)
                if last:
                    target[index] = _parse(value, source, keys)
                target = target[index]
            elif isinstance(target, dict):
                if last:
                    target[key] = _parse(value, source, keys)
                else:
                    target = target.setdefault(key, {})
            else:
                raise ConfigError(f"{source}: {keys[position - 1]!r} holds a plain value", param=".".join(keys))
        self.overlaid = {known: told for known, told in self.overlaid.items() if known[: len(keys)] != keys}
        self.overlaid[keys] = source

    def _override(self, keys: Sequence[str]) -> str | None:
        whole = tuple(keys)
        return next((self.overlaid[whole[:end]] for end in range(len(whole), 0, -1) if whole[:end] in self.overlaid), None)

    def _descend(self, keys: Sequence[str]) -> tuple[Place | None, int]:
        place, node, depth = None, self.node, 0
        for key in keys:
            step = _step(node, key)
            if step is None:
                break
            mark, node = step
            place, depth = Place(mark.line + 1, mark.column + 1), depth + 1
        return place, depth


def read_source(path: Path, overrides: Sequence[str], variables: Mapping[str, str], *, prefix: str) -> ConfigSource:
    """`overrides` are `dotted.key=value`; `variables` are environment variables, each `prefix` and the keys with `__` between.
    Raises ConfigError for what cannot be read at all."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8", param=str(path)) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {error.problem or error.context}", param=str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}", param=str(path)) from error
    if node is None or not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping at its top", param=str(path))
    source = ConfigSource(path, node, raw)
    for name, value in variables.items():
        source.overlay(tuple(name.removeprefix(prefix).lower().split("__")), value, source=name)
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set wants key=value, got {item!r}", param=item)
        source.overlay(tuple(key.split(".")), value, source=f"--set {key}")
    return source


def keys_given_twice(source: ConfigSource) -> list[Problem]:
    """YAML lets the last one win, silently."""
    return [
        Problem(f"{source.path}:{place.line}", place, key, f"{key!r} is given twice; the first time on line {first.line}")
        for key, first, place in _doubled(source.node, ())
    ]


def find_problems(root: type[BaseModel], source: ConfigSource, error: ValidationError) -> list[Problem]:
    """Everything that validation found."""
    problems = []
    everything = error.errors()
    for found in everything:
        if found["type"] == "too_short" and any(_lies_below(other["loc"], found["loc"]) for other in everything):
            continue  # a list is short because some of its items are wrong, which is said
        keys = [str(part) for part in found["loc"] if part != "[key]"]
        origin, place = source.blame(keys)
        name = ".".join(keys)
        if found["type"] == "extra_forbidden":
            problems.append(Problem(origin, place, name, f"unknown key {name!r}", _suggest(root, keys)))
            continue
        known = field_at(root, keys)
        message = f"{name or 'configuration'}: {_worded(found, secret=known is not None and not known.repr)}"
        problems.append(Problem(origin, place, name, message, help=(known.description or "") if known else ""))
    return problems


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """What was laid over the file first, then as in the file."""
    return tuple(sorted(problems, key=lambda one: (one.place.line, one.place.column) if one.place else (0, 0)))


def field_at(root: type[BaseModel], keys: Sequence[str]) -> FieldInfo | None:
    """The field that keys such as ("models", "0", "engine", "dtype") lead to; None where there is none."""
    found: FieldInfo | None = None
    part: type[BaseModel] | None = root
    inside = 0  # so many keys choose within a list or mapping
    for key in keys:
        if inside:
            inside -= 1
            continue
        if part is None or key not in part.model_fields:
            return None
        found = part.model_fields[key]
        part, inside = _part_of(found.annotation)
    return found


def fields_of(root: type[BaseModel], above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key there is, with its field: `models[].engine.dtype`, `routing.aliases.NAME.policy`."""
    for name, known in root.model_fields.items():
        part, inside = _part_of(known.annotation)
        here = f"{above}{name}"
        yield here, known
        if part is not None:
            collection = typing.get_origin(_without_none(known.annotation))
            yield from fields_of(part, here + ("[]." if inside and collection is tuple else ".NAME." if inside else "."))


def part_of(known: FieldInfo) -> type[BaseModel] | None:
    """The tree that a field holds, perhaps many of; None for plain values."""
    return _part_of(known.annotation)[0]


def _part_of(annotation: Any) -> tuple[type[BaseModel] | None, int]:
    """The part below an annotation, and how many keys lead through the collection around it."""
    annotation = _without_none(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, 0
    arguments = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case kind if kind in (tuple, list) and arguments:
            return _part_of(arguments[0])[0], 1
        case kind if kind in (dict, Mapping) and len(arguments) == 2:
            return _part_of(arguments[1])[0], 1
        case _:
            return None, 0


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        others = [one for one in typing.get_args(annotation) if one is not type(None)]
        return others[0] if len(others) == 1 else annotation
    return annotation


def _lies_below(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) > len(other) and one[: len(other)] == other


def _suggest(root: type[BaseModel], keys: list[str]) -> str:
    part = root
    if len(keys) > 1:
        above = field_at(root, keys[:-1])
        part = (part_of(above) if above else None) or root
    here = list(part.model_fields)
    close = difflib.get_close_matches(keys[-1], here, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    everywhere = [name for name, _ in fields_of(root)]
    same = [name for name in everywhere if name.rpartition(".")[2] == keys[-1]]
    if same:
        return f"there is {same[0]!r}: does it belong there?"
    close = difflib.get_close_matches(keys[-1], sorted({name.rpartition(".")[2] for name in everywhere}), n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"keys here are: {', '.join(here)}"


def _worded(found: Any, *, secret: bool) -> str:
    """pydantic's words, in ours where those are odd, and with the value where that is short and plain."""
    if found["type"] == "missing":
        return "is missing"
    message = _SHAPES.get(found["type"]) or str(found["msg"]).removeprefix("Value error, ")
    given = found.get("input")
    plain = isinstance(given, (str, int, float)) and len(str(given)) <= _LONGEST_SHOWN
    if secret or not plain or found["type"] == "value_error":
        return message
    return f"{message}, not {given!r}"


def _parse(value: str, source: str, keys: Keys) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: the value is not YAML", param=".".join(keys)) from error


def _step(node: yaml.Node, key: str) -> tuple[yaml.Mark, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        # The last one wins, as it does where values are read.
        pairs = [(name, value) for name, value in node.value if name.value == key]
        return (pairs[-1][0].start_mark, pairs[-1][1]) if pairs else None
    if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
        return node.value[int(key)].start_mark, node.value[int(key)]
    return None


def _doubled(node: yaml.Node, above: Keys) -> Iterator[tuple[str, Place, Place]]:
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _doubled(value, (*above, str(index)))
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, Place] = {}
    for name, value in node.value:
        key, place = str(name.value), Place(name.start_mark.line + 1, name.start_mark.column + 1)
        if key in seen and key != _MERGE:
            yield ".".join((*above, key)), seen[key], place
        seen.setdefault(key, place)
        yield from _doubled(value, (*above, key))
