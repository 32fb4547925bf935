"""Where a request goes: which decode worker, and whether that one or which prefill worker computes the prompt.

    reports of workers, own dispatches ──> fleet (loads, predictors, index of cached blocks) ──> policy ──> Placement

`placer` is the face of it; all but `watching` is pure: state in, decision out, the clock handed in.
"""
