"""Runs the chaos campaign on this machine and writes MATRIX.md beside this file. Exit code 1 if a cell has a problem.

python tests/chaos/run.py                        everything, some minutes
python tests/chaos/run.py --only link            one section, printed and not written
python tests/chaos/run.py --transports shm       some links only, printed and not written
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(HERE.parent))
    from support.chaos import campaign

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=["processes", "link", "transport", "rpc", "recut", "unfenced", "healthy"])
    parser.add_argument("--transports", default="", help="comma-separated; default: all that are installed")
    parser.add_argument("--verbose", action="store_true", help="a line per cell")
    chosen = parser.parse_args()
    transports = tuple(chosen.transports.split(",")) if chosen.transports else campaign.installed_transports()

    def say(line: str) -> None:
        if chosen.verbose:
            sys.stderr.write(line + "\n")

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        report = asyncio.run(campaign.run(Path(folder), transports, size=campaign.Size(), say=say, only=chosen.only))
    text = report.markdown()
    if chosen.only or chosen.transports:
        sys.stdout.write(text)
    else:
        (HERE / "MATRIX.md").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{report.totals} in {report.seconds:.0f} s\n")
    for problem in report.problems:
        sys.stdout.write(f"{problem}\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
