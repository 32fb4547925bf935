"""The hand-off's model under spin: every reachable state is searched, wrong protocols are refuted, and the model is not empty.

The searches that end within seconds run always. When property tests are asked to search for longer (`support.search_depth`) the
largest one runs too: three attempts with every fault that there is, up to 15 million states, 2.4 GB and a minute for each pair
of links.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.model_checker import missing_tool, search
from support.search_depth import FACTOR

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=f"{missing_tool()} is not installed")

MODEL = Path(__file__).with_name("handoff.pml")
UNFENCED_AND_FENCED, FENCED_AND_UNFENCED = ("FENCED0=false", "FENCED1=true"), ("FENCED0=true", "FENCED1=false")
FETCHED_AND_UNFENCED = (*FENCED_AND_UNFENCED, "FETCH")
LINKS = {
    "cuda_ipc and tcp": UNFENCED_AND_FENCED,
    "tcp and cuda_ipc": FENCED_AND_UNFENCED,
    "shm and cuda_ipc": FETCHED_AND_UNFENCED,
}
NO_WRITE_AFTER_FREE = "(owner[(place[t]+"
NO_READ_AFTER_REASSIGN = "(content[(place[t]+k)]=="
NO_READ_OF_REASSIGNED_SOURCES = "(source_owner[(source[t]+"
NO_FETCH_OF_REASSIGNED_SOURCES = "((source_owner[(source[t]+"
AT_MOST_ONE_FINISH = "(ends[r]<=1)"
EVENTUALLY_TERMINAL = "((phase[0]>=2)&&(phase[1]>=2))"
EVENTUALLY_FREED = "((((owner[0]==255)&&"

FULL = {
    "three attempts, workers crash": ("ATTEMPTS=3", "MAX_BREAKS=0", "MAX_FLIPS=0"),
    "two attempts, every fault, and a worker that may stop for ever": ("ATTEMPTS=2", "PREFILL_STOPS"),
}


@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("macros", FULL.values(), ids=FULL)
def test_no_reachable_state_is_wrong(tmp_path: Path, macros: tuple[str, ...], links: tuple[str, ...]) -> None:
    found = search(MODEL, tmp_path, *macros, *links, optimize=1)
    assert found.is_whole
    assert (found.errors, found.complaint) == (0, "")
    assert all('"-end-"' in statement for statement in found.dead_code), found.dead_code


@pytest.mark.skipif(FACTOR == 1, reason="a minute and 2.4 GB each; PDSERVE_SEARCH_TIMES=2 runs it")
@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
def test_no_reachable_state_is_wrong_with_three_attempts_and_every_fault(tmp_path: Path, links: tuple[str, ...]) -> None:
    found = search(MODEL, tmp_path, "ATTEMPTS=3", *links, optimize=2)
    assert found.is_whole
    assert (found.errors, found.complaint) == (0, "")


@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
def test_every_run_ends_with_all_requests_ended_and_all_blocks_free(tmp_path: Path, links: tuple[str, ...]) -> None:
    found = search(MODEL, tmp_path, "LIVENESS", "ATTEMPTS=2", *links, claim=True, optimize=1)
    assert found.is_whole
    assert (found.errors, found.complaint) == (0, "")


@pytest.mark.parametrize(
    ("mutant", "links", "refuted_property"),
    [
        ("NO_EPOCH", FENCED_AND_UNFENCED, NO_WRITE_AFTER_FREE),
        ("FREE_ON_ABORT", UNFENCED_AND_FENCED, NO_WRITE_AFTER_FREE),
        ("EARLY_LEASE_END", UNFENCED_AND_FENCED, NO_WRITE_AFTER_FREE),
        ("COUNT_ONLY", UNFENCED_AND_FENCED, NO_READ_AFTER_REASSIGN),
        ("NO_DIGEST", UNFENCED_AND_FENCED, NO_READ_AFTER_REASSIGN),
        ("NO_DIGEST", FETCHED_AND_UNFENCED, NO_READ_AFTER_REASSIGN),
        ("EARLY_SOURCE_END", UNFENCED_AND_FENCED, NO_READ_OF_REASSIGNED_SOURCES),
        ("EARLY_SOURCE_END", FETCHED_AND_UNFENCED, NO_READ_OF_REASSIGNED_SOURCES),
        ("FINISH_UNTAKEN", FETCHED_AND_UNFENCED, NO_FETCH_OF_REASSIGNED_SOURCES),
        ("ANY_ANSWER", UNFENCED_AND_FENCED, AT_MOST_ONE_FINISH),
        ("NO_DEADLINE", UNFENCED_AND_FENCED, EVENTUALLY_TERMINAL),
        ("DEAF_TO_LINK_END", UNFENCED_AND_FENCED, EVENTUALLY_FREED),
    ],
)
def test_a_wrong_protocol_is_refuted(tmp_path: Path, mutant: str, links: tuple[str, ...], refuted_property: str) -> None:
    found = search(MODEL, tmp_path, mutant, "ATTEMPTS=2", *links)
    assert found.errors == 1
    assert found.complaint.startswith(f"assertion violated {refuted_property}")


def test_the_claim_refutes_runs_that_never_end_well(tmp_path: Path) -> None:
    found = search(MODEL, tmp_path, "NO_DEADLINE", "LIVENESS", "ATTEMPTS=2", *UNFENCED_AND_FENCED, claim=True)
    assert (found.errors, found.complaint) == (1, "acceptance cycle")


@pytest.mark.parametrize(
    ("witness", "links"),
    [
        ("BOTH_ANSWERED", UNFENCED_AND_FENCED),
        ("RETRY_ANSWERED", UNFENCED_AND_FENCED),
        ("LATE_WRITE", UNFENCED_AND_FENCED),
        ("STALE_FETCH", FETCHED_AND_UNFENCED),
        ("ANSWERED_AFTER_CRASHES", UNFENCED_AND_FENCED),
        ("ANSWERED_AFTER_CRASHES", FETCHED_AND_UNFENCED),
    ],
)
def test_what_matters_does_happen_in_the_model(tmp_path: Path, witness: str, links: tuple[str, ...]) -> None:
    found = search(MODEL, tmp_path, witness, *links)
    assert (found.errors, found.complaint) == (1, "assertion violated 0")
