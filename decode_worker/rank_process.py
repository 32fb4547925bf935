"""Another rank of a decode worker: its share of the model, and its part in hand-offs beside it (`kvtransfer.ranks`).

Started by rank 0 (`common.engine.parallel.group`). It serves either role: a worker that changes its own keeps its ranks.
"""

from __future__ import annotations

import sys

from common.engine.parallel.rank_process import main
from kvtransfer.ranks.beside import Beside

if __name__ == "__main__":
    sys.exit(main(Beside(touch=True)))
