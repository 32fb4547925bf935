"""What is left of a cluster whose launcher and janitor were both killed, before one of them could end the rest.

Its state file is still there and says what belonged to it. The next `pdserve up` or `pdserve down` of its name does the janitor's
work.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import ClusterError
from deploy.cluster_state import cluster_lock, dead_state, state_path
from deploy.janitor import kill_all, remove_all


def clear_remains(home: Path, cluster: str) -> bool:
    """Whether there were any. The caller holds the cluster's lock. Raises ClusterError if a process does not die."""
    state = dead_state(home, cluster)
    if state is None:
        return False
    if not kill_all(state.cluster_id):
        raise ClusterError(f"what a killed cluster {cluster!r} has left does not die", param="cluster")
    remove_all([*map(Path, state.files), state_path(home, cluster)])
    return True


def clear_remains_of(home: Path, cluster: str) -> bool:
    """The same for who does not hold the lock."""
    with cluster_lock(home, cluster):
        return clear_remains(home, cluster)
