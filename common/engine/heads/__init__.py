"""Heads that guess further tokens from the hidden row that a token was drawn from (Medusa, arXiv:2401.10774).

    rows      hidden rows on their way: kept by the runner, carried by hand-offs, read by heads
    file      heads as a file, and the model that they belong to
    heads     guesses for some sequences at once

They guess and never decide; who is asked when is the business of `decode_worker.speculation`.
"""
