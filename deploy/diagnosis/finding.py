"""What the doctor says: one finding per thing that was looked at."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Severity(enum.StrEnum):
    OK = "ok"
    NOTE = "note"  # good to know; nothing has to be done
    WARNING = "warning"  # serves, but worse than it could, or not for long
    FAILURE = "failure"  # stands in the way of serving


_STATUS = {Severity.OK: 0, Severity.NOTE: 0, Severity.WARNING: 1, Severity.FAILURE: 2}


@dataclass(frozen=True, slots=True)
class Finding:
    area: str
    what: str
    found: str
    severity: Severity = Severity.OK
    means: str = ""  # why it matters
    advice: str = ""  # what to do


def exit_status(findings: Iterable[Finding]) -> int:
    """0: fit; 1: something should be mended; 2: something stands in the way of serving."""
    return max((_STATUS[finding.severity] for finding in findings), default=0)
