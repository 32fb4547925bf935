"""Runs a day and a night against real clusters (`support.day_night`): every fixed split of the workers, and the autoscaler.

python tests/scaling/day_night.py                            three workers, phases of 40 s: about nine minutes
python tests/scaling/day_night.py --only autoscaler          one arrangement
python tests/scaling/day_night.py --phase-s 15 --workers 3   a small one
python tests/scaling/day_night.py --load 1.1                 for a machine whose cores are fewer than the workers
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(HERE.parent))
    from support.day_night import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
