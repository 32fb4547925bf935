"""`pdserve profile`: where the time of a decode step goes, and that of a prompt, on this machine."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out, say

EXAMPLES = examples(
    ("eight sequences, and a prompt of 512 tokens", "pdserve profile --batch 8"),
    ("with weights in 8 bits, on two threads", "pdserve profile --weights int8 --threads 2"),
    ("where a prompt's time goes, for a script", "pdserve profile --batch 0 --json | jq '.prompt.stages[] | {stage, share}'"),
)


def profile(
    model: Annotated[str, typer.Argument(help="As `pdserve pull` takes it; it is fetched if need be.")] = "smollm2-135m",
    batch: Annotated[int, typer.Option(min=0, max=1024, help="Sequences of a decode step; 0: no decode step.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each of them, about.")] = 200,
    prompt: Annotated[int, typer.Option(min=0, help="Tokens of the prompt; 0: no prompt.")] = 512,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Decode steps that are timed.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="That compute.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    weights: Annotated[str, typer.Option(help="As engine.weights.")] = "auto",
    kernels: Annotated[str, typer.Option(help="As engine.kernels; auto takes native ones where they can be had.")] = "auto",
    exact: Annotated[bool, typer.Option("--exact", help="In exact mode.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """Times the steps of an engine in this process, stage by stage, and holds them against what the machine can do at best.

    No cluster is needed, and none should run: what else computes is measured too. What no stage accounts for is the row "rest".
    """
    with errors_as_lines():
        from pydantic import ValidationError

        from common.config import EngineConfig, pdserve_home
        from common.errors import ConfigError
        from common.model_store import pull
        from deploy.profiling.drawing import draw_profiles
        from deploy.profiling.steps import Wanted, profile_steps

        try:
            settings = EngineConfig.model_validate({"dtype": dtype, "weights": weights, "kernels": kernels, "exact": exact})
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"--{first['loc'][0]}: {first['msg']}", param=str(first["loc"][0])) from error
        files = pull(model, home=pdserve_home(), progress=say)
        wanted = Wanted(batch=batch, context=context, prompt=prompt, steps=steps)
        with redirect_stdout(sys.stderr):  # what the engine logs is no result
            found = profile_steps(files.path, settings, wanted, threads=threads, say=say)
        if as_json:
            out.print_json(asdict(found))
            return
        for part in draw_profiles(found):
            out.print(part)
