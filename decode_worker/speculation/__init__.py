"""Speculation: somebody guesses how a sequence goes on, and one step says how far the guess was right.

    proposer      guesses (`ngram`: from what was said before)                       no tensors, no clock
    controller    how long a guess pays, from how often guesses were right and what rows cost
    speculator    both of them, as the scheduler asks them
    the verifier  `common.engine.verification`, which alone decides what is said

What is here decides how fast an answer comes, never what it is.
"""
