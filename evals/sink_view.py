"""One picture, one question: where the sinks are, and how much attention heads pay to the picture before and after VAR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmprune
from vlmprune.errors import UsageError

VISUAL, VISUAL_SINK, TEXT_SINK = 1, 2, 3
"""Groups of tokens in the record of `var`."""
CAPTION = (
    "Layers that var edits, in one run with the recipe. Before: attention of a layer without its own edit, after edited "
    "layers; this is not the plain model."
)


@dataclass(frozen=True, eq=False)
class SinkView:
    """The content of the figure, for the layers that `var` edits.

    Attributes:
        layers: the layers.
        sinks: `[layer, visual]` bool, visual tokens that are sinks.
        text_sinks: per layer, text tokens that are sinks.
        before, after: `[layer, head]` attention to the image, mean over the rows after it, before and after the layer's own
            edit; earlier layers are edited in both.
    """

    layers: tuple[int, ...]
    sinks: Tensor
    text_sinks: tuple[int, ...]
    before: Tensor
    after: Tensor


def default_recipe(model: Any) -> str:
    """`var` as in its paper where the model's sink dimensions are known, otherwise by similarity to the first token."""
    try:
        vlmprune.wrap(model, "var").remove()
    except UsageError:  # another reason is refused again when the recipe is run
        return "var:sink_dims=cosine"
    return "var"


def check(recipe: str) -> vlmprune.Recipe:
    """The recipe, if there is something to draw.

    Raises:
        UsageError: it has no `var`, or one that changes nothing.
    """
    plan = vlmprune.Recipe.of(recipe)
    if not any(method.name == "var" and not method.neutral for method in plan.redistributors):
        raise UsageError(f"the view of sinks needs var in the recipe, found {plan}: for example var:sink_dims=cosine.")
    return plan


def look(model: Any, inputs: Mapping[str, Any], recipe: str) -> SinkView:
    """Run one prompt with one image under a recipe, which may also have pruning methods.

    Raises:
        UsageError: the recipe has no `var`, or one that changes nothing.
    """
    plan = check(recipe)
    with vlmprune.wrap(model, plan) as run, torch.no_grad():
        model(**inputs)
    assert run.last is not None
    edits = [record for record in run.last.edits if record.method == "var" and record.masses is not None]
    groups = [record.groups[0, 0] for record in edits if record.groups is not None]
    visual = [group[(group == VISUAL) | (group == VISUAL_SINK)] for group in groups]
    most = max(map(len, visual))

    def picture(mass: Tensor) -> Tensor:
        return (mass[0, :, :, VISUAL] + mass[0, :, :, VISUAL_SINK]).mean(dim=1)

    return SinkView(
        layers=tuple(record.layer for record in edits),
        sinks=torch.stack([torch.nn.functional.pad(group == VISUAL_SINK, (0, most - len(group))) for group in visual]),
        text_sinks=tuple(int((group == TEXT_SINK).sum()) for group in groups),
        before=torch.stack([picture(record.masses) for record in edits]),
        after=torch.stack([picture(record.masses * record.factors) for record in edits]),
    )


def draw(view: SinkView, picture: Any, grid: tuple[int, int] | None, title: str, path: Path) -> None:
    """Draw the figure: how often each token of the image is a sink, and the image's share of attention before and after.

    Args:
        picture: the image as the model got it.
        grid: rows and columns of its tokens; None if some were pruned. The map is then drawn as layers by tokens.
        title: the question.
        path: the file to write.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.9), layout="constrained")
    figure.suptitle(title)
    figure.supxlabel(CAPTION, fontsize="small")
    axes[0].imshow(picture)
    axes[0].set_title("the picture")
    axes[0].axis("off")
    if grid is not None and grid[0] * grid[1] == view.sinks.shape[1]:
        shown = axes[1].imshow(view.sinks.sum(dim=0).view(grid), cmap="magma", vmin=0, vmax=len(view.layers))
        axes[1].set_title(f"in how many of {len(view.layers)} layers a sink")
        axes[1].axis("off")
    else:
        shown = axes[1].imshow(view.sinks, cmap="magma", aspect="auto", vmin=0, vmax=1)
        axes[1].set_yticks(range(len(view.layers)), view.layers)
        axes[1].set(title="sinks", xlabel="visual token that is left", ylabel="layer")
    figure.colorbar(shown, ax=axes[1], shrink=0.8)
    highest = max(float(view.before.max()), float(view.after.max()), 0.01)
    for axis, share, name in ((axes[2], view.before, "before"), (axes[3], view.after, "after")):
        shown = axis.imshow(share, cmap="viridis", aspect="auto", vmin=0, vmax=highest)
        axis.set_yticks(range(len(view.layers)), view.layers)
        axis.set(title=f"attention to the picture, {name} ({float(share.mean()):.1%})", xlabel="head", ylabel="layer")
    figure.colorbar(shown, ax=axes[3], shrink=0.8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
