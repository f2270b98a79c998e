"""One picture or video and one question with the model that is asked; and the picture, or the frames, as the model saw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.loading.models import open_model
from vlmprune.loading.placement import execution_device
from vlmprune.loading.prompts import check_prompt, make_inputs, prompt_text
from vlmprune.loading.shown import Shown
from vlmprune.loading.videos import Video

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


ACROSS = 4
"""Frames in a row of a contact sheet."""


@dataclass(frozen=True)
class ReadyQuestion:
    """A picture or a video and a question as inputs of the model that is asked. Sets of questions are
    `evals.question.QuestionSet`.

    Attributes:
        model, processor: as loaded.
        inputs: the processor's output for the whole prompt.
        picture: as read from its file; None if there is only a video.
        notes: one sentence for every loss when the picture or the video was read.
        video: the frames that were chosen, or None.
    """

    model: Any
    processor: Any
    inputs: Any
    picture: Image.Image | None
    notes: list[str] = field(default_factory=list)
    video: Video | None = None

    def crops(self) -> list[Crop]:
        """The rasters of the picture's tokens, then those of the video's, one for each frame."""
        from vlmprune.adapters.registry import family_of

        family = family_of(self.model.config)
        found = []
        if self.picture is not None:
            grids = family.cells(self.inputs, self.model.config)[0]
            whole = family.overview % len(grids)
            found = [
                Crop(_name(row, column, whole, len(grids)), row, cells)
                for row, beside in enumerate(grids)
                for column, cells in enumerate(beside, start=1)
            ]
        if self.video is not None:
            found += self._frames(
                family, ordinal=int(self.picture is not None), row=1 + max((c.row for c in found), default=-1)
            )
        return found

    def _frames(self, family: Any, ordinal: int, row: int) -> list[Crop]:
        """Rasters of the video's frames. `row`: the first in which they are drawn."""
        import torch

        grids = family.videos.grids(self.inputs, self.model.config)
        assert grids is not None
        assert self.video is not None
        (frames, rows, columns), times = grids[0], self.video.times
        cells, shown = torch.arange(frames * rows * columns).view(frames, rows, columns), self._shown(frames)
        return [
            Crop(
                f"frame {self.video.index[own]}" + ("" if times is None else f", {times[own]:.2f} s"),
                row + number // ACROSS,
                cells[number],
                ordinal,
            )
            for number, own in enumerate(shown)
        ]

    def _shown(self, frames: int) -> list[int]:
        """Of the video's frames, those that stand for the model's, which may make one of several that follow each other."""
        assert self.video is not None
        together = -(-len(self.video) // frames)
        return [number * together for number in range(frames)]

    def seen(self) -> list[Image.Image]:
        """The picture as the model saw it, one for each crop, then the frames: cropped and resized, where the pixels still form
        pictures."""
        found = []
        if self.picture is not None:
            pixels = self.inputs["pixel_values"]
            # Patches are of a picture that was only resized.
            found = [self.picture] if pixels.ndim < 4 else self._pictures(pixels, self.processor.image_processor)
        if self.video is not None:
            pixels = self.inputs["pixel_values_videos"]
            if pixels.ndim < 5:
                count = sum(crop.ordinal == int(self.picture is not None) for crop in self.crops())
                found += [self.video.frames[number] for number in self._shown(count)]
            else:
                settings = getattr(self.processor, "video_processor", None) or self.processor.image_processor
                found += self._pictures(pixels, settings)
        return found

    def _pictures(self, pixels: Tensor, settings: Any) -> list[Image.Image]:
        """Pictures from `[…, 3, row, column]` as a processor with such settings normalised them."""
        import torch
        from PIL import Image

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
    """One raster of tokens. A picture of LLaVA-NeXT has several: of the whole picture, and of its crops; a video has one for
    each frame.

    Attributes:
        name: "picture"; where there are several, "whole picture" and "crop 1, 1" (row, column), …; of a video "frame 3, 0.30 s"
            (its number in the video, and its time if it is known).
        row: in which it is drawn.
        cells: `[rows, columns]` the index of each cell's token in the picture or video; −1 for padding, which has no token.
        ordinal: 0, or 1 for the video of a prompt that has a picture, too.
    """

    name: str
    row: int
    cells: Tensor
    ordinal: int = 0

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
    image: Path | Shown,
    prompt: str,
    device: str,
    before_loading: Callable[[], object] = lambda: None,
    device_map: str | None = None,
) -> ReadyQuestion:
    """Load a model, a picture or a video and a prompt; everything is checked before the weights are read.

    Args:
        model: path of a folder, hub id, or 'tiny' for the embedded model.
        image: path of a picture; or what is shown, a video among it.
        prompt: the question; or the whole prompt, if it has the image or the video token.
        device: where the model goes.
        before_loading: called once the picture or the video is read.
        device_map: how to spread a large model over several devices instead.

    Raises:
        UsageError: the picture, the video, the model, the prompt or the device cannot be used; says why.
    """
    check_prompt(prompt)
    notes: list[str] = []
    shown = image if isinstance(image, Shown) else Shown(image)
    picture, video = shown.open(notes.append)
    before_loading()
    processor, read_weights = open_model(model, device, device_map, shown=shown.kinds)
    text = prompt_text(processor, prompt, int(picture is not None), int(video is not None))
    inputs = make_inputs(processor, picture, text, "cpu", video)
    loaded = read_weights()
    return ReadyQuestion(loaded, processor, inputs.to(execution_device(loaded)), picture, notes, video)
