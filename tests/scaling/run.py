"""Runs the scaling campaign (`support.scaling_campaign`): pools that change under load, every answer checked to the last bit.

python tests/scaling/run.py                        three minutes, the tiny model
python tests/scaling/run.py --seconds 600 --model ~/.cache/pdserve/models/smollm2-135m
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(HERE.parent))
    from support.scaling_campaign import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
