"""Which files `-m` asks for, said without importing them: to read all of them takes longer than some stages take to run.

A test has the marks that its file names as `mark.NAME`, and `long` if its file is in a folder of long tests. A test with a mark
that its file does not name might be left out unseen, so that is an error wherever the file is read.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

_NAMED = re.compile(r"\bmark\.(\w+)")
_OF_ALL = re.compile(r"^pytestmark = (\[.*?\]\n|.*?\n)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class NamedMarks:
    of_all: frozenset[str]
    """Those that every test of the file has."""
    of_some: frozenset[str]


@functools.cache
def named_marks(path: Path) -> NamedMarks:
    text = path.read_text(encoding="utf-8")
    of_all = frozenset(name for assigned in _OF_ALL.findall(text) for name in _NAMED.findall(assigned))
    return NamedMarks(of_all, frozenset(_NAMED.findall(text)) - of_all)


def may_be_meant(expression: str, *, certain: Collection[str], possible: Collection[str]) -> bool:
    """Whether a test that has each of the `certain` marks and any of the `possible` ones can be what `-m expression` means."""
    return not expression or True in _values(ast.parse(expression, mode="eval").body, certain, possible)


def _values(node: ast.expr, certain: Collection[str], possible: Collection[str]) -> set[bool]:
    match node:
        case ast.Name(id=name):
            return {True} if name in certain else {True, False} if name in possible else {False}
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return {not value for value in _values(operand, certain, possible)}
        case ast.BoolOp(op=operator, values=operands):
            each = [_values(operand, certain, possible) for operand in operands]
            whole = all if isinstance(operator, ast.And) else any
            return {value for value in (True, False) if _can_be(whole, value, each)}
    return {True, False}  # more than pytest's marks: let it decide


def _can_be(whole: object, value: bool, each: list[set[bool]]) -> bool:
    """Whether `all` or `any` of these can come out as `value`."""
    if (whole is all) == value:
        return all(value in values for values in each)
    return any(value in values for values in each)


def refuse_unnamed_marks(items: list[pytest.Item], known: Collection[str]) -> None:
    """`known` are the marks that stages are chosen by, but for those that go by folder."""
    for item in items:
        named = named_marks(item.path)
        has = {mark.name for mark in item.iter_markers()}.intersection(known)
        if not named.of_all.intersection(known) <= has <= named.of_all | named.of_some:
            raise pytest.UsageError(f"{item.nodeid} is marked {sorted(has)}, which is not what its file says: {named}")
