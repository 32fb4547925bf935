"""`pdserve down`: stops a cluster of this machine."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, say
from deploy.commands.which_cluster import DEFAULT_CLUSTER, ClusterName

_DOWN_TIMEOUT_S = 90.0
EXAMPLES = examples(("stop the cluster of this machine", "pdserve down"), ("one of several", "pdserve down --cluster staging"))


def down(cluster: ClusterName = None) -> None:
    """Stops a cluster that runs on this machine, and waits until all of it is gone."""
    from common.config import pdserve_home
    from common.errors import ClusterError
    from deploy.cluster_state import read_state, running_clusters, wait_until_gone
    from deploy.remains import clear_remains_of

    with errors_as_lines():
        # Only the one that was named, or the default: to stop whatever happens to run would be a bad guess.
        name = cluster or DEFAULT_CLUSTER
        state = read_state(pdserve_home(), name)
        if state is None and wait_until_gone(pdserve_home(), name, _DOWN_TIMEOUT_S) and clear_remains_of(pdserve_home(), name):
            say(f"what was left of a killed cluster {name!r} is gone")
        elif state is None:
            others = running_clusters(pdserve_home())
            say(f"no cluster {name!r} runs here" + (f"; what runs is: {', '.join(others)} (--cluster NAME)" if others else ""))
        else:
            with suppress(ProcessLookupError):
                os.kill(state.launcher_pid, signal.SIGTERM)
        # Of a launcher that was killed, the janitor may still be at work.
        if not wait_until_gone(pdserve_home(), name, _DOWN_TIMEOUT_S):
            raise ClusterError(f"the cluster has not ended within {_DOWN_TIMEOUT_S:g} s; to force it, kill its launcher")
        if state is not None:
            say("stopped")
