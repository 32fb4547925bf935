"""How a step ends that nobody wants any more: whoever is told of its layers raises this between two of them.

It passes through the model and the runner, which have written keys and values of some layers and nothing else, and ends in the
core (`common.engine.core`), which does not complete the plan. It is no failure, and nobody else sees it.
"""

from __future__ import annotations


class StepStopped(Exception):
    """Raised by a `LayerDone` where `ModelRunner.can_stop`."""
