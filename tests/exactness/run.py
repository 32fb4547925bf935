"""Holds every combination of the settings that must not change an answer against one reference. Exit code 1 if any does.

python tests/exactness/run.py                      all of them, on two processes
python tests/exactness/run.py --only "2x2, draft"  those whose names have all of these words
python tests/exactness/run.py --shard 3/8          the third of eight equal parts, each a mixture of all

What is wrong is told with the place where it was found out, whatever kind of error it is; the others are checked all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    prepare()
    from support.exactness_grid import every_combination, name_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words, with commas between them")
    parser.add_argument("--shard", type=shard_of, default=(1, 1), metavar="I/N", help="the I-th of N parts")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    part, num_parts = options.shard
    words = [word.strip() for word in options.only.split(",")]
    chosen = [one for one in every_combination() if all(word in name_of(one) for word in words)]
    random.Random(0).shuffle(chosen)  # neighbours are alike, and every so-many-th is too
    chosen = chosen[part - 1 :: num_parts]
    parts = [chosen[first :: options.processes] for first in range(options.processes)]
    started_s = time.perf_counter()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn"), initializer=prepare) as pool:
        wrong = sum(pool.map(check_all, parts))
    sys.stdout.write(f"{len(chosen)} combinations, {wrong} wrong, {time.perf_counter() - started_s:.0f} s\n")
    return 1 if wrong or not chosen else 0


def shard_of(text: str) -> tuple[int, int]:
    part, _, num_parts = text.partition("/")
    if not (part.isdecimal() and num_parts.isdecimal() and 1 <= int(part) <= int(num_parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part of a whole, such as 3/8")
    return int(part), int(num_parts)


def prepare() -> None:
    """In each process, before anything of ours is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # connections end by the thousand
    for folder in (HERE.parent.parent, HERE.parent):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def check_all(combinations: Sequence[dict[str, str]]) -> int:
    """How many of them are wrong; each is told of."""
    from common.config import LoggingConfig
    from common.errors import PdserveError
    from common.logs import configure_logging
    from support.exactness_grid import Grid, name_of

    configure_logging(LoggingConfig(level="error"), process="grid")

    async def check(grid: Grid) -> int:
        wrong = 0
        for one in combinations:
            try:
                await grid.check(one)
            except (AssertionError, PdserveError, TimeoutError) as error:
                wrong += 1
                where = " < ".join(f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in reversed(found_out_at(error)))
                sys.stdout.write(f"WRONG: {name_of(one)}: {repr(error).splitlines()[0][:200]} at {where}\n")
                sys.stdout.flush()
        return wrong

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(check(Grid(Path(folder))))


def found_out_at(error: BaseException) -> list[traceback.FrameSummary]:
    """The last places on the way there; those of what it was raised instead of, if there is such."""
    while error.__cause__ is not None:
        error = error.__cause__
    return traceback.extract_tb(error.__traceback__)[-4:]


if __name__ == "__main__":
    sys.exit(main())
