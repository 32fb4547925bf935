"""The default policy: the least time, of this client and of those whom it would hold up, over all ways to serve a prompt.

    remote, p and d:   wait(p) + compute(p) + hand-off + wait for a slot(d) + slower steps(d)
                       + externality * share busy * number busy * (compute(p) - least compute of any p)
    local, d:          wait(d) + compute beside the decoding(d) + slower steps(d) + externality * held up sequences * compute(d)

wait(d) is for prompts that are computed there, or for the beginning of this one where an earlier dispatch is bringing it: the
worker does not compute it again meanwhile.

All in seconds of clients' time. The last terms are what a choice costs others: work that a better match would have spared the
pool delays everybody behind it, and a prompt computed beside decoding sequences delays each of them. They matter as much as the
wait: without them, each prompt takes the quickest way for itself and the cache is thrashed just when the pool is busy.

The parts that depend on p and those that depend on d do not overlap, so the best p and the best d are found apart. Only a few
workers are looked at: the least loaded ones, and of each group that holds the same part of the prompt the least loaded one.
With `externality` 0 this is the policy `min_ttft`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter

from common.types import WorkerRef
from router.placement.fleet import Pool
from router.placement.index import Match, PrefixIndex, slots_of
from router.placement.membership import Prompt
from router.placement.predictors import HandoffModel
from router.placement.worker import Worker

_LEAST_LOADED = 4  # looked at whatever they hold
_GROUPS = 6  # of those that hold the same part of the prompt, the ones that hold most
_LOOKED_AT = 48  # from the front of the order, before the members of a group are gone through
_KEY, _COST = attrgetter("key"), itemgetter(0)
_EQUAL_S, _EQUAL_SHARE = 5e-4, 0.03
_TPOT_TOKENS = 16.0  # a client feels a slower step as often, before somebody else comes or goes
_REMAINING_TOKENS = 128.0  # of a sequence that decodes; how long a slot takes to become free


@dataclass(frozen=True, slots=True)
class Option:
    worker: Worker
    cached_tokens: int
    ttft_s: float  # its part of the time to the first token
    cost_s: float  # the same, with what it costs others


def prefill_options(
    pool: Pool, prompt: Prompt, matches: Sequence[Match], now_s: float, *, externality: float, avoid: Collection[WorkerRef]
) -> list[Option]:
    """Best first."""
    looked_at = _shortlist(pool, matches, avoid)
    if not looked_at:
        return []
    total = prompt.num_tokens
    estimates = []
    for worker, num_blocks in looked_at:
        cached = prompt.cached_tokens(num_blocks)
        estimates.append((worker, cached, max(0.0, worker.free_at_s - now_s), worker.prompt_s(total - cached, total)))
    least_s = min(compute_s for _, _, _, compute_s in estimates)
    busy = pool.num_busy(now_s)
    burden = externality * busy * busy / len(pool)
    options = [
        Option(worker, cached, wait_s + compute_s, wait_s + compute_s + burden * (compute_s - least_s))
        for worker, cached, wait_s, compute_s in estimates
    ]
    return _ordered(options, least_s)


def decode_options(
    pool: Pool,
    prompt: Prompt,
    matches: Sequence[Match],
    index: PrefixIndex,
    handoff: HandoffModel,
    now_s: float,
    *,
    externality: float,
    avoid: Collection[WorkerRef],
) -> tuple[Option, Option] | None:
    """The best with the prompt computed elsewhere, and the best with the prompt computed there. None if there is no worker."""
    looked_at = _shortlist(pool, matches, avoid)
    if not looked_at:
        return None
    total, num_choices = prompt.num_tokens, prompt.num_choices
    remote, local = [], []
    for worker, num_blocks in looked_at:
        cached = prompt.cached_tokens(num_blocks) if num_blocks else 0
        new = total - cached
        steps, decoding, step_s = worker.steps, worker.decoding, worker.step_s
        slower_s = num_choices * steps.b + steps.c * total
        felt_s = _TPOT_TOKENS * (step_s + slower_s * (1.0 + externality * decoding))
        slot_s = _slot_wait_s(worker, total)
        there_s = slot_s + handoff.seconds(new)
        remote.append((there_s + felt_s, worker.last_used, worker, cached, there_s))
        added_s = new * (steps.b + steps.c * (total - new / 2))
        here_s = slot_s + added_s + step_s * -(-new // max(1, worker.step_tokens - decoding))
        begin_s = worker.free_at_s
        if cached:
            begin_s = max(begin_s, index.there_s(worker.slot, prompt.keys[num_blocks - 1]))
        if begin_s > now_s:
            here_s += begin_s - now_s
        local.append((here_s + felt_s + externality * decoding * added_s, worker.last_used, worker, cached, here_s))
    return _best(remote), _best(local)


def _best(ways: list[tuple[float, int, Worker, int, float]]) -> Option:
    equal_s = min(ways, key=_COST)[0] + _EQUAL_S
    cost_s, _, worker, cached, ttft_s = min((way for way in ways if way[0] <= equal_s), key=lambda way: (-way[3], way[1]))
    return Option(worker, cached, ttft_s, cost_s)


def _ordered(options: list[Option], compute_s: float) -> list[Option]:
    """Best first. Costs that differ by less than a prediction is worth are equal: then who holds most of the prompt is best, so
    that caches do not fill with copies of what is quickly computed; of those the least recently used."""
    equal_s = min(option.cost_s for option in options) + _EQUAL_S + _EQUAL_SHARE * compute_s
    options.sort(key=lambda option: (max(option.cost_s, equal_s), -option.cached_tokens, option.worker.last_used))
    return options


def _slot_wait_s(worker: Worker, num_tokens: int) -> float:
    """Until somebody else's end gives a slot, if there is none."""
    room, waiting = worker.room_tokens, worker.load.waiting
    if not waiting and (room is None or room >= num_tokens):
        return 0.0
    return (waiting + 1) / max(1, worker.load.running) * _REMAINING_TOKENS * worker.step_s


def _shortlist(pool: Pool, matches: Sequence[Match], avoid: Collection[WorkerRef]) -> list[tuple[Worker, int]]:
    """Workers worth a look, with the blocks that they hold; those to be avoided only if there is nobody else."""
    found = _look(pool, matches, avoid)
    return found if found or not avoid else _look(pool, matches, ())


def _look(pool: Pool, matches: Sequence[Match], avoid: Collection[WorkerRef]) -> list[tuple[Worker, int]]:
    by_slot = pool.by_slot
    groups = [(match.num_blocks, bits) for match in matches if (bits := match.slots & pool.bits)]
    unseen = groups[:_GROUPS]  # those of whom nobody was chosen yet
    wanted = sum(bits for _, bits in unseen)  # the groups have no member in common
    chosen: list[tuple[Worker, int]] = []
    left = _LEAST_LOADED
    for worker in itertools.islice(pool, _LOOKED_AT):
        bit = 1 << worker.slot
        if not left and not wanted & bit:
            continue
        if worker.ref in avoid:
            continue
        left = max(0, left - 1)
        held = 0
        for group in groups:
            if group[1] & bit:
                held = group[0]
                if group in unseen:
                    unseen.remove(group)
                    wanted &= ~group[1]
                break
        chosen.append((worker, held))
        if not unseen and not left:
            return chosen
    for num_blocks, bits in unseen:  # all of them stand far behind in the order
        members = (by_slot[slot] for slot in itertools.islice(slots_of(bits), _LOOKED_AT))
        best = min((worker for worker in members if worker.ref not in avoid), key=_KEY, default=None)
        if best is not None:
            chosen.append((best, num_blocks))
    return chosen
