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
from vlmprune.cli.data import Data
from vlmprune.cli.results import prepare, publish
from vlmprune.errors import UsageError
from vlmprune.loading.environment import quiet


def horizon(
    model: options.Model = "tiny",
    data: options.Data = None,
    images: options.Images = None,
    split: options.DataSplit = None,
    column: options.Columns = None,
    skip_bad: options.SkipBad = False,
    window: Annotated[int, typer.Option(metavar="N", min=1, help="Show the model one window of N × N tokens at a time.")] = 2,
    layer: Annotated[
        list[int] | None, typer.Option(metavar="N", help="A decoder layer to measure; may be repeated. If not given: all.")
    ] = None,
    chunk: Annotated[int, typer.Option(metavar="N", min=1, help="Windows in one batch; fewer need less memory.")] = 64,
    answer_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of the answer to measure; the paper measures the first.")
    ] = 1,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the decoder layer from which visual tokens no longer affect the answer, and recipes that drop them there."""
    from vlmprune.evals import horizon as evals
    from vlmprune.evals import horizon_report

    asked = Data(data, images, split, columns=column or (), skip_bad=skip_bad)
    with _calibration(model, asked, device, device_map, out, answers=True) as ready:
        measured = evals.find_horizon(ready.model, ready.samples, layer, window, chunk, answer_tokens, ready.tick)
    publish(horizon_report.result({**ready.numbers, **measured.to_dict()}), "horizon", out, as_json)


def tune(
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Find the cheapest recipe that loses at most so many points of accuracy."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="The method whose schedule is chosen: adaptinfer. With --max-drop: a method to try; may be repeated. If not "
            "given: all.",
        ),
    ] = None,
    model: options.Model = "tiny",
    data: options.Data = None,
    images: options.Images = None,
    split: options.DataSplit = None,
    column: options.Columns = None,
    skip_bad: options.SkipBad = False,
    scorer: options.Scorer = None,
    longest: options.Longest = None,
    batch: options.BatchSize = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE",
            help="With --max-drop: share of the visual tokens that enter a decoder layer in the recipes to try; may be "
            "repeated. If not given: seven between 0.7 and 0.08.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Budget: visual tokens that leave a layer, on average over layers.")
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Budget as a share of the picture's tokens. If neither is given: 0.3."),
    ] = None,
    device: options.Device = "cpu",
    device_map: options.DeviceMap = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Find the cheapest recipe within an accuracy budget, or choose the layers and counts of a method, for your model."""
    for name in method or ():
        names.check_pruning(name, "tune")
    asked = Data(data, images, split, scorer, column or (), skip_bad, longest)
    if max_drop is not None:
        from vlmprune.cli.cheapest import Wanted, find_cheapest

        if (tokens, fraction) != (None, None):
            raise UsageError("--max-drop finds the counts itself: leave out --tokens and --fraction, or --max-drop.")
        if data is None and split is not None:
            raise UsageError("--max-drop tunes on the dev scenes and confirms on the test scenes: leave out --split.")
        find_cheapest(Wanted(max_drop, model, asked, method, budget, batch, device, device_map), out, as_json)
        return
    if method is None or len(method) != 1:
        raise UsageError(
            "tune needs an accuracy budget, for example --max-drop 1.0, or one method whose schedule is chosen: --method "
            "adaptinfer."
        )
    if (scorer, longest, batch, budget) != (None, None, None, None):
        raise UsageError("--scorer, --max-new-tokens, --batch and --budget are for --max-drop: leave them out, or give it.")
    from vlmprune.evals import tune as evals
    from vlmprune.schedule import Budget

    evals.check_method(method[0])
    average = Budget(fraction=0.3) if (tokens, fraction) == (None, None) else Budget(tokens, fraction)
    with _calibration(model, asked, device, device_map, out, answers=False) as ready:
        tuned = evals.tune(ready.model, ready.samples, average, method[0], ready.tick)
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
    model: str, data: Data, device: str, device_map: str | None, out: Path | None, answers: bool
) -> Iterator[Ready]:
    """Check questions, pictures and folder, load the model, and show a progress bar over the samples.

    Raises:
        UsageError: one of them cannot be used; says why, before anything is computed.
    """
    from vlmprune.evals import calibration
    from vlmprune.evals.results import stamp
    from vlmprune.loading.models import open_model

    data.check(model)
    if data.name is None:
        questions, notes = calibration.scenes(data.images or 40, data.split or "dev"), []
    else:
        opened = data.open(("image", "answer") if answers else ("image",))
        questions, notes = list(opened), list(opened.notes)
    prepare(out)
    quiet()
    processor, read_weights = open_model(model, device, device_map)
    samples_of = calibration.samples(processor, questions, answers)
    loaded = read_weights()
    samples = samples_of(loaded)
    terminal.note(notes)
    numbers = {"model": model, "data": data.name or "scenes", "notes": notes, **stamp()}
    with terminal.progress() as progress:
        task = progress.add_task("samples", total=len(questions))
        yield Ready(loaded, samples, lambda share: progress.advance(task, share), numbers)
