"""Pools that scale on their own: what workers say of themselves becomes need, need becomes a decision with a reason.

    readings of workers (signals) -> how many workers each pool needs (need) -> what to do about it (law) -> the pool manager
    (loop)

Everything but `loop` is pure: state in, state out, time handed in.
"""
