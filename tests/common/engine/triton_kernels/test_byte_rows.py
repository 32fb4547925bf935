from __future__ import annotations

import pytest
import torch

from common.engine.triton_kernels.byte_rows import copy_rows, copy_rows_reference, sum_rows, sum_rows_reference


def memory(rows: int, words: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (rows * words,), generator=generator).to(device)


@pytest.mark.parametrize("words", [8, 1024, 1500])
def test_rows_are_copied_and_nothing_else(words: int, device: torch.device) -> None:
    source, destination = memory(9, words, device), memory(7, words, device, seed=1)
    expected = destination.clone()
    sources, destinations = torch.tensor([8, 0, 3], device=device), torch.tensor([2, 6, 5], device=device)
    copy_rows_reference(source, expected, sources, destinations, words)
    copy_rows(source, destination, sources, destinations, words)
    assert torch.equal(destination, expected)


@pytest.mark.parametrize("words", [8, 1024, 2500])
def test_sums_are_those_of_the_reference(words: int, device: torch.device) -> None:
    rows = memory(5, words, device)
    chosen = torch.tensor([4, 1, 1, 0], device=device)
    assert torch.equal(sum_rows(rows, chosen, words), sum_rows_reference(rows, chosen, words))


def test_every_flipped_bit_and_swapped_word_shows(device: torch.device) -> None:
    words = 24
    rows = memory(1, words, device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    variants = []
    for place in range(words):
        for bit in range(0, 64, 7):
            damaged = rows.clone()
            damaged[place] ^= 1 << bit if bit < 63 else -(1 << 63)
            variants.append(damaged)
        swapped = rows.clone()
        swapped[place], swapped[place - 1] = rows[place - 1], rows[place]
        variants.append(swapped)
    sums = sum_rows_reference(torch.cat(variants), torch.arange(len(variants), device=device), words)
    intact = sum_rows(rows, one, words)
    assert (sums == intact).any(dim=1).sum() == 0  # in neither sum
    assert len(set(map(tuple, sums.tolist()))) == len(variants)
