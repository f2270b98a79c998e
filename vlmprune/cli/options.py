"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEMO_RECIPE = "divprune:fraction=0.1"
MODEL = "Folder or hub id of a VLM; 'tiny' is the embedded model, 'tiny-clips' that for videos."

Model = Annotated[str, typer.Option(metavar="NAME", help=MODEL)]
Image = Annotated[Path | None, typer.Option(metavar="FILE", help="The picture.")]
Video = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="The video: a file (needs av: pip install 'vlmprune[video]'), or a folder with its frames as pictures.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Frames of the video, evenly spaced. If not given: 8 of a file, all of a folder's."),
]
Fps = Annotated[float | None, typer.Option(metavar="RATE", min=0.001, help="Frames of each second of a video file, instead.")]
Prompt = Annotated[
    str, typer.Option(metavar="TEXT", help="The question; or the whole prompt, if it has the model's image or video token.")
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
    str | None,
    typer.Option(
        metavar="NAME",
        help="Your questions: a folder with questions.jsonl and its pictures, a folder with a Hugging Face dataset, or the "
        "name of a task of lmms-eval (docs/evaluation.md); or 'clips', drawn videos (docs/tiny.md). If not given: scenes of "
        "the embedded model.",
    ),
]
Images = Annotated[
    int | None, typer.Option(metavar="N", min=2, help="How many questions to use. If not given: all of --data, or 40 scenes.")
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Held-out scenes: test; or dev, on which settings are chosen.")]
DataSplit = Annotated[
    str | None,
    typer.Option(
        "--split",
        metavar="NAME",
        help="Of the scenes: test, or dev, on which settings are chosen. Of a dataset: the split to use, if it has several.",
    ),
]
Scorer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How answers are scored: exact, normalised, vqa, relaxed, anls or choice. If not given: as the questions say, "
        "else choice where there are choices, and normalised.",
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="MEANING=NAME",
        help="A column of a dataset with an unusual name, for example question=query; may be repeated. Meanings: id, image, "
        "question, answer, choices, group, unit.",
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out questions with a picture that cannot be read; they are counted and named.")
]
BatchSize = Annotated[int | None, typer.Option("--batch", metavar="N", min=1, help="Questions asked at once.")]
Longest = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        min=1,
        help="The longest answer, in tokens. If not given: as the questions say, else 32.",
    ),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        help="For pictures by class: a text with {} in the place of the class; may be repeated. If not given: a photo of a {}.",
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, …")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Spread a large model over the devices of this machine, and over CPU and disk where it does not fit: auto, "
        "balanced, balanced_low_0 or sequential.",
    ),
]
Out = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Also write the numbers, the table and the figure here.")]
Wait = Annotated[
    float,
    typer.Option(
        metavar="MINUTES",
        min=0,
        help="With several processes: how long the first waits for the others without a new answer (docs/evaluation.md).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
