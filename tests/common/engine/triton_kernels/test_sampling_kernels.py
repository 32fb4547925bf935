"""Draws, rules and log-probabilities by Triton against the sampler that runs on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine import logit_edits
from common.engine import sampler as on_host
from common.engine.batch import SampleSpec
from common.engine.draw_settings import settings_of
from common.engine.logit_rules import apply_rules
from common.engine.token_rules import Bias, Penalties, RowRules
from common.engine.triton_kernels import edit_logits, log_sums, row_draws, sampler, select
from common.errors import EngineFailure
from support.host_draws import HostDraws

SPEC = SampleSpec(position=0, seed=1, choice=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
GREEDY = replace(SPEC, temperature=0.0)
SPECS = [
    GREEDY,
    SPEC,
    replace(SPEC, temperature=0.3, seed=2**64 - 1),
    replace(SPEC, temperature=1.5, top_k=7),
    replace(SPEC, temperature=2.0, top_p=0.77),
    replace(SPEC, top_k=40, top_p=0.9501, min_p=0.01, choice=3),
    replace(SPEC, min_p=0.3, seed=-5),
    replace(SPEC, top_k=1),
    replace(SPEC, top_k=10_000, top_p=0.02),
]


def draw(logits: torch.Tensor, specs: list[SampleSpec], rows: list[int], chunk: int = 64) -> list[int]:
    return select.draw_tokens(
        logits,
        torch.from_numpy(settings_of(specs, rows)).to(logits.device),
        any_top_k=any(spec.top_k for spec in specs),
        any_top_p=any(spec.top_p < 1.0 for spec in specs),
        chunk=chunk,
    ).tolist()


def expected(logits: torch.Tensor, specs: list[SampleSpec], rows: list[int]) -> list[int]:
    return [token.token_id for token in on_host.sample(logits.cpu(), specs, rows)]


def test_a_seed_means_the_same_tokens_as_on_the_host(device: torch.device) -> None:
    logits = (torch.randn(3, 120, generator=torch.Generator().manual_seed(0))).to(device)
    specs = [replace(spec, position=position) for position in (0, 8191) for spec in SPECS[position // 8191 * 7 :]]
    rows = [i % 3 for i in range(len(specs))]
    together = draw(logits, specs, rows, chunk=128)
    assert together == expected(logits, specs, rows)
    assert len(set(together)) > 5
    assert draw(logits[2:], [specs[5]], [0]) == [together[5]]  # alone, and summed in parts
    assert draw(logits, [specs[1], specs[2]], [1, 2]) == together[1:3]  # without the launches for filters of others


@pytest.mark.long
def test_of_equal_logits_the_first_are_kept(device: torch.device) -> None:
    """Ties across chunks, at the last place of top-k and of top-p, and both zeros. Each token that is kept is drawn."""
    row = torch.full((600,), -4.0)
    row[[5, 200, 300, 301, 599]] = 0.0
    row[[200, 599]] = -0.0
    row[400] = 1.0
    logits = row[None].to(device)
    cases = {
        "top-k": (replace(SPEC, temperature=5.0, top_k=4), {400, 5, 200, 300}),
        # The best weighs 2.718, the others 1 each and 10.88 together: a fifth of all is one and two of the five.
        "top-p": (replace(SPEC, top_p=0.2), {400, 5, 200}),
        "both": (replace(SPEC, top_k=5, top_p=0.7), {400, 5, 200}),
        "min-p": (replace(SPEC, min_p=0.3), {400, 5, 200, 300, 301, 599}),
    }
    for name, (spec, kept) in cases.items():
        many = [replace(spec, position=position) for position in range(100)]
        tokens = expected(logits, many, [0] * 100)
        specs = [many[tokens.index(token)] for token in sorted(kept)]
        assert draw(logits, specs, [0] * len(kept), chunk=128) == sorted(kept), name


@pytest.mark.long
@pytest.mark.parametrize("keep", [0, 128])
def test_where_one_token_is_left_it_is_drawn(device: torch.device, keep: int) -> None:
    row = torch.full((1, 200), -torch.inf)
    row[0, keep] = -3.0
    assert draw(row.to(device), SPECS, [0] * len(SPECS)) == [keep] * len(SPECS)


@pytest.mark.long
def test_flat_logits_and_extreme_ones_are_survived(device: torch.device) -> None:
    logits = torch.stack((torch.zeros(100), torch.linspace(-1e30, 1e30, 100), torch.full((100,), 1e-40))).to(device)
    specs, rows = [spec for spec in SPECS[3:6] for _ in range(3)], [0, 1, 2] * 3
    assert draw(logits, specs, rows) == expected(logits, specs, rows)
    assert draw(logits, [replace(SPEC, temperature=1e-9)], [1]) == [99]


@pytest.mark.parametrize("row", [[0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0], [-torch.inf] * 3])
def test_no_token_is_drawn_from_broken_logits(device: torch.device, row: list[float]) -> None:
    logits = torch.tensor([row, [0.0, 1.0, 2.0]], device=device)
    assert draw(logits, [GREEDY, GREEDY, replace(SPEC, top_p=0.5)], [0, 1, 0]) == [select.BROKEN, 2, select.BROKEN]
    hiding = RowRules(allowed_token_ids=np.array([2]), banned_token_ids=np.array([1]))
    for spec in (SPEC, replace(GREEDY, rules=hiding)):
        with pytest.raises(EngineFailure, match="finite"):
            sampler.sample(logits, [spec], [0])


logit_rows = st.lists(st.integers(-12, 12), min_size=3, max_size=40).map(lambda row: torch.tensor(row, dtype=torch.float32) / 2)


@pytest.mark.long
@settings(max_examples=12, deadline=None)
@given(
    row=logit_rows,
    temperature=st.sampled_from([0.2, 1.0, 3.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.0501, 0.3337, 0.9507, 1.0]),
    min_p=st.sampled_from([0.0, 0.0503, 1.0]),
    chunk=st.sampled_from([16, 64]),
)
def test_any_row_draws_what_the_host_draws(
    row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, chunk: int
) -> None:
    logits = row[None].to("cuda" if torch.cuda.is_available() else "cpu")
    spec = replace(SPEC, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    specs = [replace(spec, position=position) for position in range(2)]
    assert draw(logits, specs, [0] * 2, chunk) == expected(logits, specs, [0] * 2)


def test_the_reference_is_the_sampler_of_the_host(device: torch.device) -> None:
    logits = (torch.randn(2, 90, generator=torch.Generator().manual_seed(3)) * 2).to(device)
    specs, rows = [*SPECS, *SPECS], [0] * len(SPECS) + [1] * len(SPECS)
    chosen = torch.from_numpy(settings_of(specs, rows)).to(device)
    assert select.draw_tokens_reference(logits, chosen, any_top_k=True, any_top_p=True).tolist() == expected(logits, specs, rows)


class Mask:
    """Of a grammar, as far as logits are concerned."""

    def __init__(self, allowed: np.ndarray) -> None:
        self.words = np.packbits(allowed, bitorder="little").view(np.uint32)


def test_rules_change_what_the_host_would_change(device: torch.device) -> None:
    vocab, generator = 300, np.random.default_rng(0)
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(0))

    def ids(count: int) -> np.ndarray:
        return generator.permutation(vocab)[:count].astype(np.int64)

    penalties = [
        Penalties(ids(n), generator.integers(0, 3, n).astype(np.float32), repetition, 0.3, -0.2)
        for n, repetition in ((40, 1.3), (5, 0.8))
    ]
    bias = Bias(ids(20), generator.standard_normal(20).astype(np.float32))
    unknown = np.array([vocab, vocab + 9, 4], dtype=np.int64)  # end tokens that the model has no logit for
    mask = Mask((generator.random(320) < 0.4).astype(np.uint8))
    rules = [
        RowRules(bias=bias, penalties=penalties[0]),
        RowRules(penalties=penalties[1], banned_token_ids=unknown),
        RowRules(allowed_token_ids=ids(3)),
        RowRules(bias=bias, mask=mask),  # type: ignore[arg-type]
        RowRules(allowed_token_ids=ids(1), banned_token_ids=ids(2)),
        RowRules(),
    ]
    ours, theirs = logits.to(device), logits.clone()
    edit_logits.apply_rules(ours, rules)
    apply_rules(theirs, rules)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.cpu().isinf(), theirs.isinf())


def test_edits_in_a_block_with_room_to_spare_are_those_of_the_host(device: torch.device) -> None:
    """What was there before, behind the entries, is not looked at: the step before may have had more."""
    vocab = 300
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(4))
    few = [(1, RowRules(Bias(np.array([4, 9]), np.array([1.5, -3.0], dtype=np.float32)), banned_token_ids=np.array([3])))]
    many = [(0, RowRules(banned_token_ids=np.arange(290))), *few]
    words = np.zeros(700, dtype=np.int32)
    for ruled in (many, few):
        logit_edits.write_edits(words, ruled, vocab)
        ours, theirs = logits.clone().to(device), logits.clone()
        row_draws.TritonRowDraws().edit(ours, torch.from_numpy(words).to(device))
        HostDraws().edit(theirs, torch.from_numpy(words))
        assert torch.equal(ours.cpu(), theirs)
    assert int(theirs.isinf().sum()) == 1


def test_log_probabilities_are_those_of_the_host(device: torch.device) -> None:
    logits = torch.randn(4, 900, generator=torch.Generator().manual_seed(0)) * 4
    logits[1, 3:] = -torch.inf
    logits[2, [800, 20]] = 30.0
    exact = logits.double().logsumexp(-1)
    torch.testing.assert_close(log_sums.log_sums(logits.to(device), chunk=128).cpu().double(), exact, rtol=2e-7, atol=1e-6)
    specs = [replace(GREEDY, logprobs=3), replace(SPEC, logprobs=0), replace(GREEDY, logprobs=2), GREEDY]
    specs[0] = replace(specs[0], rules=RowRules(banned_token_ids=np.array([int(logits[0].argmax())])))
    ours, theirs = sampler.sample(logits.to(device), specs, [0, 1, 2, 3]), on_host.sample(logits, specs, [0, 1, 2, 3])
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.token_id == wanted.token_id
        assert (got.logprob is None) == (wanted.logprob is None)
        if got.logprob is not None and wanted.logprob is not None:
            assert [token_id for token_id, _ in got.logprob.top] == [token_id for token_id, _ in wanted.logprob.top]
            assert got.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=1e-5)
