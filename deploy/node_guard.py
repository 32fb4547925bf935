"""Ends what Ray leaves on a host when its raylet is gone: a process of its own, started beside Ray by `deploy.ray_node`.

    the raylet ends (told to, or because no head was heard for a minute) -> whatever bears the node's mark is killed

`ray down` stops Ray on the head only, if the hosts are nobody's to switch off; raylets elsewhere end by themselves, but not the
processes that they started. What belongs to the node bears its mark in the environment.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Sequence

from deploy.janitor import kill_all

MARK_VARIABLE = "PDSERVE_RAY_NODE"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.node_guard")
    parser.add_argument("--mark", required=True)
    parser.add_argument("--raylet", type=int, required=True, metavar="PID")
    given = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        raylet = os.pidfd_open(given.raylet)
    except ProcessLookupError:
        raylet = None  # it is gone already
    if raylet is not None:
        select.select([raylet], [], [])
    return 0 if kill_all(given.mark, variable=MARK_VARIABLE) else 1


if __name__ == "__main__":
    sys.exit(main())
