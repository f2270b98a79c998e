"""Commands that find settings for a model: `vlmprune horizon | tune | sinks`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.cli.results import Found, prepare, publish
from vlmprune.errors import UsageError
from vlmprune.loading.environment import environment, quiet
from vlmprune.show.table import table

EVIDENCE = ("layer", "dim", "energy", "φ", "norm of the first", "of others", "× median", "attention to the first")
"""Columns of the table of `sinks`; "the first" is the prompt's first token."""


def horizon(
    model: options.Model = "tiny",
    data: options.Data = None,
    images: options.Images = None,
    window: Annotated[int, typer.Option(metavar="N", min=1, help="Show the model one window of N × N tokens at a time.")] = 2,
    layer: Annotated[
        list[int] | None, typer.Option(metavar="N", help="A decoder layer to measure; may be repeated. If not given: all.")
    ] = None,
    chunk: Annotated[int, typer.Option(metavar="N", min=1, help="Windows in one batch; fewer need less memory.")] = 64,
    answer_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of the answer to measure; the paper measures the first.")
    ] = 1,
    device: options.Device = "cpu",
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the decoder layer from which visual tokens no longer affect the answer, and recipes that drop them there."""
    from vlmprune.evals import horizon as evals

    with _calibration(model, data, images, device, out, answers=True) as ready:
        result = evals.find_horizon(ready.model, ready.samples, layer, window, chunk, answer_tokens, ready.tick)
    recipes = [f"{made.recipe}  ({made.compute_average:.1f} visual tokens enter a layer)" for made in result.compositions()]
    found = Found(
        name="horizon",
        numbers=ready.numbers | result.to_dict(),
        table=table(evals.COLUMNS, evals.rows(result)),
        sentences=[*evals.sentences(result), *recipes],
        markdown=evals.markdown(result),
        plot=partial(evals.plot, result),
    )
    publish(found, out, as_json)


def tune(
    method: Annotated[str, typer.Option(metavar="NAME", help="The method whose schedule is chosen: adaptinfer.")],
    model: options.Model = "tiny",
    data: options.Data = None,
    images: options.Images = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Budget: visual tokens that leave a layer, on average over layers.")
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Budget as a share of the picture's tokens. If neither is given: 0.3."),
    ] = None,
    device: options.Device = "cpu",
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Choose the layers and token counts of a method for your model, from its attention."""
    names.check_pruning(method, "tune")
    from vlmprune.evals import tune as evals
    from vlmprune.schedule import Budget

    evals.check_method(method)
    budget = Budget(fraction=0.3) if (tokens, fraction) == (None, None) else Budget(tokens, fraction)
    with _calibration(model, data, images, device, out, answers=False) as ready:
        result = evals.tune(ready.model, ready.samples, budget, method, ready.tick)
    if out is not None:
        result.recipe.save_pretrained(out)
    found = Found(
        name="tune",
        numbers=ready.numbers | result.to_dict(),
        table=table(evals.COLUMNS, evals.rows(result)),
        sentences=[*evals.sentences(result), *([f"The recipe is saved in {out}"] if out else [])],
        markdown=evals.markdown(result),
        plot=partial(evals.plot, result),
    )
    publish(found, out, as_json)


def sinks(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Folder or hub id of a language model or VLM; 'tiny' is the embedded model.")
    ] = "tiny",
    gguf: Annotated[
        str | None, typer.Option(metavar="FILE", help="A GGUF file in that folder (needs the package gguf).")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A text; may be repeated. If not given: eight short texts.")
    ] = None,
    device: options.Device = "cpu",
    as_json: options.AsJson = False,
) -> None:
    """Find the dimensions of the residual that mark a decoder's attention sinks (for the method var), with the evidence."""
    if gguf is not None and model == "tiny":
        raise UsageError(f"--gguf {gguf} is a file in the folder of a model: give that folder as --model.")
    from vlmprune.evals.sinks import PROMPTS, TINY_PROMPTS, find_sinks
    from vlmprune.loading.models import load_decoder

    quiet()
    decoder, tokenize = load_decoder(model, gguf, device)
    found = find_sinks(decoder, [tokenize(text) for text in prompt or (TINY_PROMPTS if model == "tiny" else PROMPTS)])
    if as_json:
        terminal.print_json(found.to_dict())
        return
    cells = [
        (
            *(str(row.layer), str(row.dim), f"{row.energy:.1%}", f"{row.phi:.1f}", f"{row.first_norm:.0f}"),
            *(f"{row.other_norm:.0f}", f"{row.ratio:.0f}", f"{row.attention:.1%}"),
        )
        for row in found.evidence
    ]
    terminal.print_table(table(EVIDENCE, cells))
    terminal.say(*(f"{label:<28}{value}" for label, value in found.rows()), found.advice, *found.cautions)


@dataclass(frozen=True)
class Ready:
    """What a calibration needs, loaded and checked.

    Attributes:
        model: as loaded.
        samples: the questions, as inputs of the model.
        tick: to be called with the share of a sample that was just computed.
        numbers: the settings, as they stand in the result's JSON.
    """

    model: Any
    samples: Iterator[Any]
    tick: Callable[[float], None]
    numbers: dict[str, Any]


@contextmanager
def _calibration(
    model: str, data: Path | None, images: int | None, device: str, out: Path | None, answers: bool
) -> Iterator[Ready]:
    """Check questions, pictures and folder, load the model, and show a progress bar over the samples.

    Raises:
        UsageError: one of them cannot be used; says why, before anything is computed.
    """
    from vlmprune.evals import calibration
    from vlmprune.loading.models import open_model

    if data is None and model != "tiny":
        raise UsageError("the built-in scenes are for the embedded model: give --data with questions for yours.")
    questions = calibration.scenes(images or 40) if data is None else calibration.read(data, answers, images)
    notes = [*calibration.fewer(len(questions), images), *calibration.check_pictures(questions)]
    prepare(out)
    quiet()
    processor, read_weights = open_model(model, device)
    samples = calibration.samples(processor, questions, device)
    loaded = read_weights()
    terminal.note(notes)
    numbers = {"model": model, "data": str(data or "scenes"), "notes": notes, "environment": environment()}
    with terminal.progress() as progress:
        task = progress.add_task("samples", total=len(questions))
        yield Ready(loaded, samples, lambda share: progress.advance(task, share), numbers)
