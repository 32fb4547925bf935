"""`pdserve doctor`: is this machine fit, is the configuration, does KV get from every prefill worker to every decode worker.

Works without a cluster; of one that runs it also tries the links. Exit status 0: fit, perhaps with notes; 1: something should be
mended; 2: something stands in the way of serving.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out
from deploy.commands.up import DEFAULT_CONFIG
from deploy.commands.which_cluster import ClusterName
from deploy.diagnosis.finding import Finding, Severity, exit_status

if TYPE_CHECKING:
    from common.config import Config
    from deploy.cluster_state import ClusterState
    from deploy.diagnosis.links import LinkFinding

EXAMPLES = examples(
    ("before the first start", "pdserve doctor cluster.yaml"),
    ("of a cluster that runs, with its links", "pdserve doctor --cluster local"),
    ("what is wrong, for a program", "pdserve doctor --json | jq '.findings[] | select(.severity != \"ok\")'"),
)


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(help="A configuration to check as well; default: that of the cluster.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    cluster: ClusterName = None,
) -> None:
    """Checks machine, software, configuration, models and ports, and tries every link between workers.

    Each finding says what it means and what to do.
    Exit status: 0 fit, 1 something should be mended, 2 something stands in the way of serving.
    """
    from deploy.diagnosis.drawing import draw_findings

    with errors_as_lines():
        state = _running(cluster)
        path = config or (Path(state.config_path) if state is not None and state.config_path else DEFAULT_CONFIG)
        links: list[LinkFinding] = []
        findings = list(_check(path, state))
        if state is not None:
            links, more = _check_links(state)
            findings += more
        status = exit_status(findings)
        if as_json:
            out.print_json(
                {
                    "status": status,
                    "config": str(path),
                    "cluster": state.cluster if state is not None else None,
                    "findings": [asdict(finding) for finding in findings],
                    "links": [asdict(link) for link in links],
                }
            )
        else:
            draw_findings(findings, links, path, running=state is not None)
        raise typer.Exit(status)


def _running(cluster: str | None) -> ClusterState | None:
    from common.errors import ClusterError
    from deploy.commands.which_cluster import chosen_state

    try:
        return chosen_state(cluster)
    except ClusterError:
        if cluster is not None:
            raise
        return None


def _check(path: Path, state: ClusterState | None) -> Iterator[Finding]:
    from common.config import pdserve_home
    from deploy.diagnosis.machine import check_machine
    from deploy.diagnosis.models import check_models
    from deploy.diagnosis.ports import check_ports
    from deploy.diagnosis.shared_store import check_store
    from deploy.diagnosis.software import check_software
    from deploy.diagnosis.storage import check_storage

    config, findings = _check_config(path)
    yield from check_machine()
    yield from check_software(config)
    yield from check_storage(pdserve_home())
    yield from findings
    if config is not None:
        yield from check_models(config, pdserve_home())
        yield from check_ports(config.router, ours=_ports_of(state, config))
        yield from check_store(config.cache.redis)


def _check_config(path: Path) -> tuple[Config | None, list[Finding]]:
    from common.config import check_config
    from common.errors import ConfigError

    try:
        checked = check_config(path)
    except ConfigError as error:
        return None, [Finding("config", "file", error.message, Severity.FAILURE, "nothing starts with it")]
    if not checked.problems:
        return checked.config, [Finding("config", "file", f"{path}: good")]
    advice = f"pdserve config check {path}"
    return None, [Finding("config", one.key, one.line, Severity.FAILURE, one.help, advice) for one in checked.problems]


def _ports_of(state: ClusterState | None, config: Config) -> frozenset[int]:
    """Those on which routers of the running cluster listen, if it is the one of this configuration."""
    from common.errors import PdserveError
    from deploy.commands.manager import ask_status, call_manager

    if state is None or state.cluster != config.cluster:
        return frozenset()
    try:
        snapshot = call_manager(state, ask_status)
    except PdserveError:
        return frozenset()
    addresses = [address for router in snapshot.routers for address in (router.http_address, router.grpc_address)]
    return frozenset(int(address.rpartition(":")[2]) for address in addresses if address)


def _check_links(state: ClusterState) -> tuple[list[LinkFinding], list[Finding]]:
    import asyncio

    from common.errors import PdserveError
    from deploy.diagnosis.links import probe_links

    try:
        return asyncio.run(probe_links(state))
    except PdserveError as error:
        return [], [Finding("cluster", state.cluster, error.message, Severity.FAILURE, "nothing is known of its workers")]
