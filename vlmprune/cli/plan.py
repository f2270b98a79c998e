"""The command that plans a measurement: `vlmprune power`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmprune.cli import options
from vlmprune.cli.results import prepare, publish
from vlmprune.errors import UsageError


def power(
    loss: Annotated[
        list[float] | None,
        typer.Option(metavar="POINTS", help="A loss to be found, in points of 100; may be repeated. If not given: 1, 2 and 5."),
    ] = None,
    pilot: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A folder with answers.jsonl, or the JSON file of `eval` or `sweep`: how much its recipes differ is measured "
            "there.",
        ),
    ] = None,
    accuracy: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Without a pilot: accuracy of the reference, from 0 to 1.")
    ] = None,
    agreement: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Without a pilot: share of questions that both answer right or both answer wrong. If not given: as if the "
            "recipe were right independently of the reference.",
        ),
    ] = None,
    per_picture: Annotated[int, typer.Option(metavar="N", min=1, help="Without a pilot: questions about each picture.")] = 1,
    correlation: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Without a pilot: how alike the questions about one picture turn out, from 0 to 1."),
    ] = 1.0,
    power: Annotated[float, typer.Option(metavar="SHARE", help="Probability that the loss is found.")] = 0.9,
    alpha: Annotated[float, typer.Option(metavar="SHARE", help="Level of the test.")] = 0.05,
    comparisons: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many recipes are compared, for which p-values are corrected.")
    ] = 1,
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Find how many questions and pictures a comparison needs, so that a given loss of accuracy is seen."""
    from vlmprune.evals import power as evals
    from vlmprune.evals.results import stamp

    losses = loss or list(evals.LOSSES)
    if pilot is not None:
        if (accuracy, agreement, per_picture, correlation) != (None, None, 1, 1.0):
            raise UsageError("a pilot replaces --accuracy, --agreement, --per-picture and --correlation: give it alone.")
        pairs = [(spread, points) for spread in evals.from_pilot(pilot) for points in losses]
    else:
        pairs = [(evals.assumed(points, accuracy, agreement, per_picture, correlation), points) for points in losses]
    numbers = evals.plan(pairs, power, alpha, comparisons)
    prepare(out)
    publish(evals.result({**numbers, **stamp()}), "power", out, as_json)
