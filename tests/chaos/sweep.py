"""Kills the decode worker after each of 64 token indices of an answer, for each way of generating, and writes KILL_SWEEP.md.

python tests/chaos/sweep.py                      everything, some minutes
python tests/chaos/sweep.py --ways greedy --indices 1 17      a part, printed and not written

Exit code 1 if a client noticed anything.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.chaos.kill_sweep import Kill

HERE = Path(__file__).resolve().parent
INDICES = range(1, 65)


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(HERE.parent))
    from common.config import LoggingConfig
    from common.logs import configure_logging
    from support.chaos.kill_sweep import WAYS, running_sweep
    from support.chaos.zygote import Zygote
    from support.tiny_models import make_tiny_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--indices", nargs="+", type=int, default=list(INDICES))
    chosen = parser.parse_args()
    configure_logging(LoggingConfig(level="error"), process="sweep")

    async def sweep(folder: Path) -> list[Kill]:
        zygote = Zygote(folder / "workers.log")
        try:
            async with running_sweep(zygote, make_tiny_model(folder / "model", seed=5)) as running:
                return [await running.kill_after(way, index) for way in chosen.ways for index in chosen.indices]
        finally:
            zygote.close()

    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        kills = asyncio.run(sweep(Path(folder)))
    text = "\n".join(_table(chosen.ways, kills))
    if chosen.ways == list(WAYS) and chosen.indices == list(INDICES):
        (HERE / "KILL_SWEEP.md").write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    problems = [kill for kill in kills if kill.problems]
    sys.stdout.write(f"{len(kills)} kills, {len(problems)} noticed, in {time.monotonic() - started_s:.0f} s\n")
    for kill in problems:
        sys.stdout.write(f"{kill.way}, after {kill.num_tokens} tokens: {'; '.join(kill.problems)[:400]}\n")
    return 1 if problems else 0


def _table(ways: Sequence[str], kills: Sequence[Kill]) -> list[str]:
    rows = []
    for way in ways:
        mine = [kill for kill in kills if kill.way == way]
        same = sum(not kill.problems for kill in mine)
        rows.append(f"| {way} | {len(mine)} | {same} | {', '.join(str(k.num_tokens) for k in mine if k.problems) or 'none'} |")
    return [
        "# The kill sweep",
        "",
        "Written by `tests/chaos/sweep.py`. The decode worker that serves a streamed answer stands still as soon as so many",
        "tokens of the first choice are with gRPC, and is killed there (SIGKILL); indices go from 1 to 64, so every place in a",
        "KV block is met. *Identical*: token ids, text, log-probabilities and finish reason of every choice are those of an",
        "undisturbed answer, the stream ended as it should, and no survivor holds a block, a lease or a request.",
        "",
        "| way of generating | kills | identical | not identical, by index |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
