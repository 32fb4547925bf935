"""`pdserve train-heads`: makes the heads by which a model guesses its own next tokens, from what the model itself says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.examples import examples
from deploy.commands.output import errors_as_lines, out, say

EXAMPLES = examples(
    ("for the default model", "pdserve train-heads smollm2-135m"),
    ("and then", "pdserve up --set decode.speculation.method=medusa"),
    ("on prompts like those that will come, one a line", "pdserve train-heads smollm2-135m --prompts prompts.txt"),
)


def train_heads(
    model: Annotated[str, typer.Argument(help="A model on this machine, named as in `source`.")],
    output: Annotated[
        Path | None, typer.Option(help="The file; default: where workers look for the heads of this model.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with a prompt a line; default: built-in ones.", show_default=False)
    ] = None,
    answers: Annotated[int, typer.Option(min=24, help="Most prompts that are answered.")] = 1200,
    answer_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of an answer.")] = 160,
    minutes: Annotated[float, typer.Option(min=0.1, help="Most time: half of it for answers, half for training.")] = 16.0,
    guesses: Annotated[int, typer.Option(min=1, max=16, help="Tokens guessed at a time.")] = 3,
    words: Annotated[int, typer.Option(min=16, help="Tokens that can be guessed: those said most.")] = 4096,
    width: Annotated[int, typer.Option(min=8, help="Of the heads' inner layer.")] = 576,
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute.")] = 1,
) -> None:
    """Trains heads that guess a model's next tokens, on its own answers. Takes minutes; the model is not changed.

    Says at the end how often guesses were right in answers that were held back.
    """
    from common.clock import SystemClock
    from common.config import pdserve_home
    from common.model_store import resolve

    with errors_as_lines():
        from deploy.heads.job import Job, make_heads

        home = pdserve_home()
        job = Job(
            files=resolve(model, home=home),
            output=output,
            prompts=prompts,
            num_answers=answers,
            answer_tokens=answer_tokens,
            num_guesses=guesses,
            num_words=words,
            width=width,
            passes=3.0,
            budget_s=60.0 * minutes,
            threads=threads,
        )
        path, report = make_heads(job, home, SystemClock(), say)
        say(
            f"learned from {report.num_tokens} tokens; of {report.num_held_back} held back"
            f" {report.words_cover:.0%} can be named; guesses right: {_shares(report.right)}"
            f" (with all before them: {_shares(report.right_so_far)}), so {report.more_tokens:.2f} more tokens per step"
        )
        out.print(str(path), markup=False, soft_wrap=True)


def _shares(shares: tuple[float, ...]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)
