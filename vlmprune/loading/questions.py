"""One picture and one question with the model that is asked; and the picture as the model saw it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.loading.models import open_model
from vlmprune.loading.pictures import open_picture
from vlmprune.loading.placement import execution_device
from vlmprune.loading.prompts import check_prompt, make_inputs, prompt_text

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class ReadyQuestion:
    """A picture and a question as inputs of the model that is asked. Sets of questions are `evals.question.QuestionSet`.

    Attributes:
        model, processor: as loaded.
        inputs: the processor's output for the whole prompt.
        picture: as read from its file.
        notes: one sentence for every loss when the picture was read.
    """

    model: Any
    processor: Any
    inputs: Any
    picture: Image.Image
    notes: list[str] = field(default_factory=list)

    def crops(self) -> list[Crop]:
        """The rasters of the picture's tokens."""
        from vlmprune.adapters.registry import family_of

        family = family_of(self.model.config)
        grids = family.cells(self.inputs, self.model.config)[0]
        whole = family.overview % len(grids)
        return [
            Crop(_name(row, column, whole, len(grids)), row, cells)
            for row, beside in enumerate(grids)
            for column, cells in enumerate(beside, start=1)
        ]

    def seen(self) -> list[Image.Image]:
        """The picture as the model saw it, one for each crop: cropped and resized, where the pixels still form a picture."""
        import torch
        from PIL import Image

        pixels = self.inputs["pixel_values"]
        if pixels.ndim < 4:  # patches of a picture that was only resized
            return [self.picture]
        settings = self.processor.image_processor
        shown = []
        for crop in pixels.flatten(0, -4):
            colours = crop.float().cpu()
            if settings.do_normalize:
                middle, spread = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
                colours = colours * spread + middle
            colours = colours.clamp(0, 1) * 255 if settings.do_rescale else colours.clamp(0, 255)
            shown.append(Image.fromarray(colours.round().byte().permute(1, 2, 0).numpy()))
        return shown


@dataclass(frozen=True, eq=False)
class Crop:
    """One raster of a picture's tokens. LLaVA-NeXT has several: of the whole picture, and of its crops.

    Attributes:
        name: "picture"; where there are several, "whole picture" and "crop 1, 1" (row, column), …
        row: in which it is drawn.
        cells: `[rows, columns]` the index of each cell's token in the picture; −1 for padding, which has no token.
    """

    name: str
    row: int
    cells: Tensor

    @property
    def tokens(self) -> int:
        """How many cells have a token."""
        return int((self.cells >= 0).sum())


def _name(row: int, column: int, whole: int, rows: int) -> str:
    """What a raster shows. `whole` is the row of that of the whole picture; rows of crops count from 1."""
    if rows == 1:
        return "picture"
    return "whole picture" if row == whole else f"crop {row + (row < whole)}, {column}"


def open_question(
    model: str,
    image: Path,
    prompt: str,
    device: str,
    before_loading: Callable[[], object] = lambda: None,
    device_map: str | None = None,
) -> ReadyQuestion:
    """Load a model, a picture and a prompt; everything is checked before the weights are read.

    Args:
        model: path of a folder, hub id, or 'tiny' for the embedded model.
        image: path of a picture.
        prompt: the question; or the whole prompt, if it has the image token.
        device: where the model goes.
        before_loading: called once the picture is read.
        device_map: how to spread a large model over several devices instead.

    Raises:
        UsageError: the picture, the model, the prompt or the device cannot be used; says why.
    """
    check_prompt(prompt)
    notes: list[str] = []
    picture = open_picture(image, notes.append)
    before_loading()
    processor, read_weights = open_model(model, device, device_map)
    inputs = make_inputs(processor, picture, prompt_text(processor, prompt), "cpu")
    loaded = read_weights()
    return ReadyQuestion(loaded, processor, inputs.to(execution_device(loaded)), picture, notes)
