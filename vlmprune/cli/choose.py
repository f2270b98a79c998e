"""Commands that find settings for a model: `vlmprune horizon | tune | sinks`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmprune import names
from vlmprune.cli import options, terminal
from vlmprune.cli.results import prepare, publish
from vlmprune.errors import UsageError
from vlmprune.loading.environment import quiet


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
    from vlmprune.evals import horizon_report

    with _calibration(model, data, images, device, out, answers=True) as ready:
        measured = evals.find_horizon(ready.model, ready.samples, layer, window, chunk, answer_tokens, ready.tick)
    publish(horizon_report.result({**ready.numbers, **measured.to_dict()}), "horizon", out, as_json)


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
        tuned = evals.tune(ready.model, ready.samples, budget, method, ready.tick)
    if out is not None:
        tuned.recipe.save_pretrained(out)
    publish(evals.result({**ready.numbers, **tuned.to_dict()}), "tune", out, as_json)
    if out is not None and not as_json:
        terminal.say(f"The recipe is saved in {out}")


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
    from vlmprune.evals import sinks_report
    from vlmprune.evals.results import stamp
    from vlmprune.evals.sinks import PROMPTS, TINY_PROMPTS, find_sinks
    from vlmprune.loading.models import load_decoder

    quiet()
    decoder, tokenize = load_decoder(model, gguf, device)
    found = find_sinks(decoder, [tokenize(text) for text in prompt or (TINY_PROMPTS if model == "tiny" else PROMPTS)])
    publish(sinks_report.result(found, stamp()), "sinks", None, as_json)


@dataclass(frozen=True)
class Ready:
    """What a calibration needs, loaded and checked.

    Attributes:
        model: as loaded.
        samples: the questions, as inputs of the model.
        tick: to be called with the share of a sample that was just computed.
        numbers: the settings, for the JSON of the result.
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
    from vlmprune.evals.results import stamp
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
    numbers = {"model": model, "data": str(data or "scenes"), "notes": notes, **stamp()}
    with terminal.progress() as progress:
        task = progress.add_task("samples", total=len(questions))
        yield Ready(loaded, samples, lambda share: progress.advance(task, share), numbers)
