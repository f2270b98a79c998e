"""What video methods lose on drawn clips, beside random tokens of each frame at equal counts.

    python benchmarks/clips.py [--clips 120] [--threads 1] [--out docs/results/clips-cpu]

The embedded model for clips (docs/tiny.md) answers every question about held-out clips of 8 frames, of 36 visual tokens each,
un-pruned and with `KEPT` of the 288 tokens before the first layer. `per="frame"` keeps equally many of every frame. Differences
are to random tokens per frame (mean of `SEEDS` seeds), on the same questions: means over skills, intervals resample clips,
p-values are of the sign-flip test over clips, corrected by Holm's method for all lines (vlmprune/evals/stats.py). Answers are
kept in the folder PATH-answers: a killed run continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import vlmprune
from vlmprune.evals.answering import answer, recipe_name, settings_of
from vlmprune.evals.answers import UNPRUNED, Answered
from vlmprune.evals.asking import Asking
from vlmprune.evals.fingerprints import code_fingerprint
from vlmprune.evals.questions import CLIPS, open_questions
from vlmprune.evals.results import Result, stamp
from vlmprune.evals.stats import correct, differences_of_many, estimate, estimate_by_group
from vlmprune.evals.store import Store
from vlmprune.loading.models import open_model
from vlmprune.show.table import table
from vlmprune.tiny.clips import FRAMES

KEPT = (72, 40)
"""Tokens kept of a clip: a quarter, and a little more than one frame, which EVS keeps whole."""
SEEDS = 3
PER_FRAME = "random, per frame"
METHODS: dict[str, str] = {
    PER_FRAME: "random:layer=0,per=frame,tokens={each},seed={seed}",
    "random, per video": "random:layer=0,tokens={all},seed={seed}",
    "uniform, per video": "uniform:layer=0,tokens={all}",
    "uniform, per frame": "uniform:layer=0,per=frame,tokens={each}",
    "divprune, per video": "divprune:layer=0,tokens={all}",
    "divprune, per frame": "divprune:layer=0,per=frame,tokens={each}",
    "evs": "evs:layer=0,tokens={all}",
    "vidcom2": "vidcom2:layer=0,tokens={all}",
    "fastvid": "fastvid:layer=0,tokens={all}",
}
"""Name of each line -> its recipe; lines with a seed are means over `SEEDS` seeds."""
BATCH = 32


def recipes(name: str, kept: int) -> list[vlmprune.Recipe]:
    """What a line asks: one recipe, or one for each seed."""
    text = METHODS[name]
    seeds = range(SEEDS if "{seed}" in text else 1)
    return [vlmprune.Recipe.parse(text.format(all=kept, each=kept // FRAMES, seed=seed)) for seed in seeds]


def measure(model: Any, asking: Asking, store: Store, kept: tuple[int, ...] = KEPT, tick: Any = None) -> Answered:
    """All answers."""
    asked = [None, *(recipe for count in kept for name in METHODS for recipe in recipes(name, count))]
    found = answer(model, [asking], [(0, recipe) for recipe in asked], store, tick=tick or (lambda *_: None))
    assert found is not None  # this process is alone
    return found


def numbers_of(answered: Answered, kept: tuple[int, ...] = KEPT) -> dict[str, Any]:
    """The lines of the table as plain data, the un-pruned model first."""
    plain = answered.scored([(UNPRUNED, 0)])
    lines = {
        (name, count): answered.scored([(recipe_name(recipe), 0) for recipe in recipes(name, count)])
        for count in kept
        for name in METHODS
    }
    pairs = {
        (name, count): (own.score, lines[PER_FRAME, count].score) for (name, count), own in lines.items() if name != PER_FRAME
    }
    over = correct({key: mean for key, (mean, _) in differences_of_many(pairs, plain.unit, plain.group).items()})
    rows = [
        {
            "name": name,
            "recipe": str(recipes(name, count)[0]) if name != UNPRUNED else UNPRUNED,
            "kept": count,
            "mean": estimate(own.score, own.unit, own.group).to_dict(),
            "by_skill": {skill: one.to_dict() for skill, one in estimate_by_group(own.score, own.unit, own.group).items()},
            "over_random_per_frame": over[name, count].to_dict() if (name, count) in over else None,
            "share": own.share,
        }
        for (name, count), own in [((UNPRUNED, answered.answers[UNPRUNED, 0].kept[0]), plain), *lines.items()]
    ]
    return {"clips": len(set(answered.asked[0].units)), "questions": len(answered.asked[0].ids), "rows": rows}


def result(numbers: Mapping[str, Any]) -> Result:
    """A table for each count."""
    rows = numbers["rows"]
    skills = list(rows[0]["by_skill"])
    counts = ", ".join(f"{skill} {entry['n']}" for skill, entry in rows[0]["by_skill"].items())
    parts: list[Any] = [
        f"Accuracy in %, {numbers['clips']} held-out clips, {numbers['questions']:,} questions ({counts}). 95 % intervals; "
        f"p-values are corrected for all {sum(row['over_random_per_frame'] is not None for row in rows)} comparisons."
    ]
    columns = ["method", *skills, "mean of skills", "over random per frame", "p", "verdict"]
    for kept in dict.fromkeys(row["kept"] for row in rows[1:]):
        own = [rows[0], *(row for row in rows[1:] if row["kept"] == kept)]
        parts += [
            f"**{kept} of {rows[0]['kept']} tokens kept:**",
            table(columns, map(partial(cells, skills=skills), own), title=f"{kept} tokens kept"),
        ]
    parts.append([f"{row['name']}: `{row['recipe']}`" for row in rows[1 : len(METHODS) + 1]])
    return Result(numbers, parts)


def cells(row: Mapping[str, Any], skills: list[str]) -> list[Any]:
    """One line of a table."""
    mean, over = row["mean"], row["over_random_per_frame"]
    name = row["name"]
    return [
        name,
        *(f"{100 * row['by_skill'][skill]['value']:.1f}" for skill in skills),
        f"{100 * mean['value']:.1f} [{100 * mean['low']:.1f}, {100 * mean['high']:.1f}]",
        "—" if over is None else f"{100 * over['value']:+.1f} [{100 * over['low']:.1f}, {100 * over['high']:.1f}]",
        "—" if over is None else f"{over['corrected']:.2g}",
        "—" if over is None else over["verdict"],
    ]


def main(
    clips: Annotated[int, typer.Option(min=2)] = 120,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path("docs/results/clips-cpu"),
) -> None:
    torch.set_num_threads(threads)
    questions = open_questions(CLIPS, clips)
    processor, read_weights = open_model("tiny-clips", "cpu")
    model = read_weights()
    asking = Asking(processor, questions, BATCH, encode_once=True)
    settings = settings_of("tiny-clips", model, processor, questions, BATCH)
    kept_answers = out.with_name(f"{out.name}-answers")
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        Store(kept_answers, settings, code_fingerprint()) as store,
    ):
        task = progress.add_task("clips", total=None)
        answered = measure(
            model, asking, store, tick=lambda step, done, total: progress.update(task, completed=done, total=total)
        )
    command = f"python benchmarks/clips.py --clips {clips} --threads {threads}"
    result({**stamp(command), **numbers_of(answered)}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
