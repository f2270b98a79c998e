"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEMO_RECIPE = "divprune:fraction=0.1"
MODEL = "Folder or hub id of a VLM; 'tiny' is the embedded model."

Model = Annotated[str, typer.Option(metavar="NAME", help=MODEL)]
Image = Annotated[Path, typer.Option(metavar="FILE", help="The picture.")]
Prompt = Annotated[
    str, typer.Option(metavar="TEXT", help="The question; or the whole prompt, if it has the model's image token.")
]
Recipe = Annotated[
    str, typer.Option(metavar="RECIPE", help="A recipe; or a JSON file, folder or hub repository that holds one.")
]
Recipes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RECIPE",
        help="A recipe to measure; may be repeated. If not given: random, cls, divprune and fastv, at four budgets each.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Your questions: a folder with questions.jsonl and its pictures (docs/tuning.md). If not given: scenes of the "
        "embedded model.",
    ),
]
Images = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="How many questions to use. If not given: all of --data, or 40 scenes.")
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Held-out scenes: test; or dev, on which settings are chosen.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, …")]
Out = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Also write the numbers, the table and the figure here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
