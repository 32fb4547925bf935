"""What processes say of themselves: logs and traces."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.part import Part


class TracingConfig(Part):
    """OpenTelemetry. Needs pdserve[otel]."""

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+/?$",
        description="The collector's OTLP/gRPC address, such as http://127.0.0.1:4317. Default: nothing is traced.",
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of the traces that begin here; those that a client began are its to decide."
    )


class LoggingConfig(Part):
    """Each process logs to its stderr and, in a cluster, to a file that `pdserve logs` reads."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is less important is not logged.")
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="Of what goes to stderr. auto: console on a terminal, JSON elsewhere. Files hold JSON."
    )
    folder: str | None = Field(
        None, description="Where each process keeps its file. Default: `pdserve up` makes a folder for each of its runs."
    )
    max_file_bytes: int = Field(
        16 * 1024 * 1024, ge=0, description="Most that a process keeps in files; the oldest half is thrown away. 0: no files."
    )
    keep_runs: int = Field(3, ge=1, description="Of how many runs of a cluster logs are kept, the present one among them.")
