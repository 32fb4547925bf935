"""What real workers tell of themselves for those who look on: totals, blocks, and where KV came from."""

from __future__ import annotations

import time
from pathlib import Path

from common.config import EngineConfig
from support.tiny_models import make_tiny_model
from support.workers import request, running_workers

ENGINE = EngineConfig(dtype="float32", exact=True, kv_pool_tokens=1024)
PROMPT_TOKENS, BLOCK_TOKENS = 57, 16


async def test_links_blocks_and_totals_are_what_was_done(tmp_path: Path) -> None:
    began_s = time.time()
    model_path = make_tiny_model(tmp_path, seed=5)
    async with running_workers(model_path, engine=ENGINE, num_prefill=2, transports=("tcp",)) as workers:
        before = await workers.info(workers.decode_ref.address)
        assert not before.links
        assert began_s <= before.started_s <= time.time()
        work = request(list(range(3, 3 + PROMPT_TOKENS)), max_tokens=5)
        await workers.generate(work, prefill=workers.prefill_refs[:1])
        await workers.assert_nothing_leaks()
        after = await workers.info(workers.decode_ref.address)
        (link,) = after.links
        whole_blocks = -(-PROMPT_TOKENS // BLOCK_TOKENS)
        assert (link.prefill_worker_id, link.prefill_incarnation) == ("tiny/prefill/0", 1)
        assert (link.transport, link.transfers, link.failures) == ("tcp", 1, 0)
        assert link.bytes == whole_blocks * workers.decode._loaded.engine.layout.block_bytes
        assert (after.blocks_arriving, after.blocks_in_transfer) == (0, 0)
        assert after.blocks_cached == PROMPT_TOKENS // BLOCK_TOKENS  # only full blocks can be found again
        assert (after.prefix_queries, after.prefix_hits, after.pace.generated_tokens) == (PROMPT_TOKENS, 0, 5)
        prefill = await workers.info(workers.prefill_refs[0].address)
        assert prefill.pace.computed_tokens == PROMPT_TOKENS
        assert not prefill.links

        await workers.prefill[0].stop(0.0)
        again = request(list(range(90, 90 + PROMPT_TOKENS)), request_id="again", max_tokens=2)
        await workers.generate(again, prefill=workers.prefill_refs)
        links = {link.prefill_worker_id: link for link in (await workers.info(workers.decode_ref.address)).links}
        assert (links["tiny/prefill/0"].transport, links["tiny/prefill/0"].failures) == ("", 1)
        assert links["tiny/prefill/1"].transfers == 1
