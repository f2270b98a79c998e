"""The embedded model's own tower as an image encoder: how much of its CLS token is left when patches are dropped.

    python benchmarks/tower_accuracy.py [--train 3000] [--images 600] [--out docs/results/tower_accuracy-cpu]

The tower stands alone (`vlmprune.wrap(tower, recipe)`). Its CLS token was trained to say which of 48 combinations of colour and
shape a scene has. A linear classifier reads them from the CLS token that leaves the un-pruned tower, fitted on scenes that are
not measured; then it reads held-out scenes under every recipe. Each scene is asked about the combinations that it has, and
about the absent ones; the score is the mean of the two shares of right answers (50 is guessing). Intervals resample scenes;
losses are paired, and corrected for all recipes by Holm's method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import vlmprune
from vlmprune import tiny
from vlmprune.evals.results import Part, Result, stamp
from vlmprune.evals.stats import LEVEL, Difference, Estimate, correct, difference, estimate
from vlmprune.show.table import code, table
from vlmprune.tiny.scenes import COLOURS, SHAPES, Scene, held_out

FRACTIONS = (0.5, 0.25, 0.1, 0.05)
AT = 2
"""First block without the dropped patches, of recipes that drop at one place; the tower has 6 blocks."""
METHODS = {
    "flowcut": "",
    "evit": "",
    "evit, no fusing": ",fuse=no",
    f"evit, behind block {AT - 1}": f",blocks={AT - 1}",
    "random": f",layer={AT},seed=0",
    "uniform": f",layer={AT}",
    "divprune": f",layer={AT}",
    "tome": f",layer={AT}",
}
BATCH = 50
COMBINATIONS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
COLUMNS = ("recipe", "score, %", "lost against un-pruned", "present, %", "absent, %", "FLOPs of the blocks, %")


def present(scenes: Sequence[Scene]) -> np.ndarray:
    """`[scene, combination]` bool."""
    there = [{(one.colour, one.shape) for one in scene.objects} for scene in scenes]
    return np.array([[pair in own for pair in COMBINATIONS] for own in there])


@torch.no_grad()
def encode(tower: Any, pixels: Tensor, recipe: str | None) -> tuple[Tensor, float]:
    """`[scene, dim]` the CLS token that leaves the last block, and the share of FLOPs that the blocks computed."""
    with nullcontext() if recipe is None else vlmprune.wrap(tower, recipe) as run:
        features, spent, full = [], 0, 0
        for batch in pixels.split(BATCH):
            features.append(tower(batch).last_hidden_state[:, 0])
            if run is not None:
                report = run.report()
                spent, full = spent + report.flops, full + report.flops_unpruned
    return torch.cat(features), 1.0 if recipe is None else spent / full


def pixels_of(processor: Any, scenes: Iterable[Scene]) -> Tensor:
    """`[scene, 3, 96, 96]`."""
    found: Tensor = processor.image_processor(images=[scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    return found


def fitted(features: Tensor, wanted: Tensor) -> torch.nn.Module:
    """Logistic regression of every combination, present and absent weighing alike."""
    scale = features.std(dim=0) + 1e-6
    mean = features.mean(dim=0)
    line = torch.nn.Linear(features.shape[1], wanted.shape[1])
    torch.nn.init.zeros_(line.weight)
    torch.nn.init.zeros_(line.bias)
    weight = (1 - wanted).sum(dim=0) / wanted.sum(dim=0)
    search = torch.optim.LBFGS(line.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        found = binary_cross_entropy_with_logits(line((features - mean) / scale), wanted, pos_weight=weight)
        found = found + 1e-4 * line.weight.square().sum()
        found.backward()
        return found

    search.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        line.weight /= scale
        line.bias -= line.weight @ mean
    return line


def measure(train: int, images: int) -> list[dict[str, Any]]:
    """One line for each recipe."""
    model, processor = tiny.load()
    tower = model.model.vision_tower
    learned, asked = list(held_out(train, "dev")), list(held_out(images, "test"))
    features, _ = encode(tower, pixels_of(processor, learned), None)
    line = fitted(features, torch.tensor(present(learned), dtype=torch.float32))
    pixels, there = pixels_of(processor, asked), present(asked)
    unit = np.repeat(np.arange(images), len(COMBINATIONS))
    group = np.where(there, "present", "absent").ravel()
    recipes = [f"{name.partition(',')[0]}:fraction={kept}{more}" for kept in FRACTIONS for name, more in METHODS.items()]
    scores: dict[str | None, np.ndarray] = {}
    flops: dict[str | None, float] = {}
    for recipe in track([None, *recipes], "recipes", console=Console(stderr=True), transient=True):
        found, flops[recipe] = encode(tower, pixels, recipe)
        with torch.no_grad():
            scores[recipe] = ((line(found) > 0).numpy() == there).astype(float).ravel()
    lost = correct({recipe: difference(scores[None], scores[recipe], unit, group) for recipe in recipes})
    lines = []
    for recipe, score in scores.items():
        of_group = {name: float(score[group == name].mean()) for name in ("present", "absent")}
        lines.append(
            {
                "recipe": recipe,
                "score": estimate(score, unit, group).to_dict(),
                "lost": None if recipe is None else lost[recipe].to_dict(),
                "flops": flops[recipe],
                **of_group,
            }
        )
    return lines


def result(numbers: Mapping[str, Any]) -> Result:
    """The result as a table."""
    rows, unseen = [], []
    for line in numbers["lines"]:
        plain, score = line["recipe"] is None, Estimate(**line["score"])
        lost = None if plain else Difference(**{key: value for key, value in line["lost"].items() if key != "verdict"})
        if lost is not None and lost.corrected >= LEVEL:
            unseen.append(f"`{line['recipe']}`")
        shares = [f"{100 * line[name]:.1f}" for name in ("present", "absent", "flops")]
        rows.append(
            [
                "un-pruned" if plain else code(line["recipe"]),
                str(score),
                "—" if lost is None else str(lost).lstrip("+"),
                *shares,
            ]
        )
    title = f"colour-shape combinations from the CLS token, {numbers['images']} held-out scenes"
    said = [
        f"A linear classifier, fitted on the un-pruned tower's CLS tokens of {numbers['train']:,} other scenes. The score is "
        "the mean of the right answers about combinations that are present and about absent ones.",
        "No difference from un-pruned could be seen (sign-flip test over scenes, corrected for all recipes by Holm's method): "
        f"{', '.join(unseen) or 'nowhere'}.",
    ]
    parts: list[Part] = [table(COLUMNS, rows, title=title), said]
    return Result(numbers, parts)


def main(
    train: Annotated[int, typer.Option(min=100, help="Scenes that the classifier is fitted on.")] = 3000,
    images: Annotated[int, typer.Option(min=10, help="Held-out scenes.")] = 600,
    out: Annotated[Path, typer.Option(help="Path of the results, without suffix.")] = Path("docs/results/tower_accuracy-cpu"),
) -> None:
    """Measure, print, and write the results."""
    torch.manual_seed(0)
    lines = measure(train, images)
    command = f"python benchmarks/tower_accuracy.py --train {train} --images {images}"
    result({**stamp(command), "train": train, "images": images, "lines": lines}).deliver(Console(), out)


if __name__ == "__main__":
    typer.run(main)
