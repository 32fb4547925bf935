"""Where the time of an engine's steps goes.

stopwatch   seconds of each stage, its own only
work        what a stage has to read and to compute at least
watched     an engine whose steps are timed: `take` gives a `StepProfile`
"""
