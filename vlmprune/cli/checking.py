"""The command that judges a pruned run: `vlmprune check`."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.loading.environment import quiet
from vlmprune.loading.prompts import check_prompt
from vlmprune.loading.shown import Shown


def check(
    prompt: options.Prompt,
    image: options.Image = None,
    video: options.Video = None,
    frames: options.Frames = None,
    fps: options.Fps = None,
    model: options.Model = "tiny",
    recipe: options.Recipe = options.DEMO_RECIPE,
    new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to generate: one from the prompt, the others in decoding steps.")
    ] = 6,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """Compare a pruned run with the un-pruned model with the same tokens masked; exit code 1 unless they are equal."""
    names.check_recipe(recipe)
    check_prompt(prompt)
    shown = Shown(image, video, frames, fps)
    shown.check()
    from vlmprune.live.check import check as compare
    from vlmprune.loading.questions import open_question

    quiet()
    question = open_question(model, shown, prompt, device)
    terminal.note(question.notes)
    verdict = compare(question.model, question.inputs, recipe, new_tokens=new_tokens)
    if as_json:
        terminal.print_json(verdict.to_dict())
    else:
        terminal.say(*str(verdict).splitlines())
    if not verdict.passed:
        raise typer.Exit(1)
