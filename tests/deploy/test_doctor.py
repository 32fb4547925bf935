"""What the doctor says of a machine and of a broken link."""

from __future__ import annotations

import pytest

from deploy.commands.doctor import advise, check_machine


def test_the_machine_that_runs_the_tests_is_fit() -> None:
    findings = {finding.what: finding for finding in check_machine()}
    assert all(finding.ok for finding in findings.values())
    assert findings["torch"].found == "installed"
    assert findings["python"].found.startswith("3.")


@pytest.mark.parametrize(
    ("kind", "code", "param", "expected"),
    [
        ("tcp", "HandshakeRefused", "cluster_token", "same token"),
        ("nixl", "HandshakeRefused", "transports", "needed only for RDMA"),
        ("shm", "TransferBroken", "", "one host only"),
        ("tcp", "TransferBroken", "", "firewall"),
        ("tcp", "HandshakeRefused", "layout", "it failed (layout)"),
        ("shm", "WorkerLost", "", "it failed (WorkerLost)"),
    ],
)
def test_each_way_to_fail_has_advice(kind: str, code: str, param: str, expected: str) -> None:
    assert expected in advise(kind, code, param, "it failed")
