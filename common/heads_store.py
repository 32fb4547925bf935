"""Where the heads are that guess for a model (`common.engine.heads`): the first of these that there is.

    as configured           `decode.speculation.heads`, and then nothing else
    <home>/heads/           what `pdserve train-heads` made on this machine
    common/shipped_heads/   what comes with pdserve, for the default model

A file says itself which model it was made for, and who loads it refuses it for any other. Models are told apart by digest here,
too: the default model has its heads under whatever name or path it is served.

What is shipped was made by `pdserve train-heads smollm2-135m --minutes 120`, where the clock has no say: there is time for all
answers and all steps, seeds are fixed, one thread computes. The same command makes the same file on such a CPU (AVX-512 with
bfloat16).
"""

from __future__ import annotations

from pathlib import Path

_SHIPPED = Path(__file__).parent / "shipped_heads"
SHIPPED_FOR = {"2a6fce1a843366a9547f530a8cce341d82e41947bcfb606e41daf9bd984a146f": "smollm2-135m.safetensors"}


def heads_path(home: Path, model: str) -> Path:
    """Where the heads for the model of this digest lie if they are made on this machine."""
    return home / "heads" / f"{model[:16]}.safetensors"


def find_heads(home: Path, model: str) -> Path | None:
    """The heads for the model of this digest, unless somebody names others; None if there are none."""
    made_here = heads_path(home, model)
    if made_here.is_file():
        return made_here
    return _SHIPPED / SHIPPED_FOR[model] if model in SHIPPED_FOR else None
