"""Where the visual tokens of one forward call are: per sample, per image.

Everything that depends on a prompt's shape is decided here once, so that neither methods nor hooks assume one image, one
batch row, or a fixed number of prefix tokens.

A prompt is read from the device to the host once, before the first layer (`Tokens.read`). Everything shapes depend on is known
from there, so that nothing waits for the device while layers run. What is on the host is NumPy, what is on the device is torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError

Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one call, on the host.

    Attributes:
        ids: `[batch, sequence]`; where only embeddings were given, numbers that are equal for equal ones.
        real: `[batch, sequence]` False on what the call's mask hides: padding, or any other token, pictures' too.
        placeholders: `[batch, sequence]` True on image placeholders, masked or not.
        end: `[batch]` place of the last token that belongs to the prompt.
        segments: `[batch, sequence]` which of several samples in one row each token belongs to, from 0; None if every row is
            one sample.
    """

    ids: np.ndarray[Any, Any]
    real: Bools
    placeholders: Bools
    end: np.ndarray[Any, Any]
    segments: np.ndarray[Any, Any] | None = None

    @staticmethod
    def read(ids: Tensor, mask: Tensor | None, image_token: int, tail: int) -> Tokens:
        """One transfer from the device, which waits for it.

        Args:
            ids: `[batch, sequence]`.
            mask: `[batch, sequence or more]`, 0 on padding; its last columns are those of `ids`.
            image_token: id of the placeholder.
            tail: tokens at the end that are not part of the prompt.
        """
        if mask is None:
            known = on_host(ids)
            real = np.ones(known.shape, dtype=bool)
        else:
            sequence = ids.shape[1]
            known, seen = on_host(torch.stack((ids, (mask[:, -sequence:] != 0).to(ids))))
            real = seen != 0
        return Tokens.of(known, real, known == image_token, tail)

    @staticmethod
    def of(
        ids: np.ndarray[Any, Any],
        real: Bools,
        placeholders: Bools,
        tail: int = 0,
        segments: np.ndarray[Any, Any] | None = None,
    ) -> Tokens:
        """A prompt whose last token, of each row, is `tail` tokens before the last that is there."""
        end = np.where(real, np.arange(real.shape[1]), 0).max(axis=1) - tail
        return Tokens(ids, real, placeholders, end, segments)

    @property
    def visual(self) -> Bools:
        """`[batch, sequence]` image placeholders that the mask does not hide."""
        return self.placeholders & self.real

    @property
    def masked(self) -> Bools:
        """`[batch, sequence]` image placeholders that the mask hides."""
        return self.placeholders & ~self.real

    def segment(self, sample: int) -> np.ndarray[Any, Any]:
        """`[sequence]` which of its samples each token of a row belongs to."""
        return np.zeros(self.real.shape[1], dtype=int) if self.segments is None else self.segments[sample]

    @property
    def starts(self) -> np.ndarray[Any, Any]:
        """`[batch, segment]` place of the first token of each sample of a row; where a row has fewer, 0."""
        if self.segments is None:
            return np.asarray(self.real.argmax(axis=1))[:, None]
        count = int(self.segments.max()) + 1
        return np.asarray(((self.segments[:, None] == np.arange(count)[:, None]) & self.real[:, None]).argmax(axis=2))

    @property
    def ends(self) -> np.ndarray[Any, Any]:
        """`[batch, segment]` place of the last token of each sample of a row; where a row has fewer, its own last."""
        if self.segments is None:
            return self.end[:, None]
        count, place = int(self.segments.max()) + 1, np.arange(self.real.shape[1])
        mine = (self.segments[:, None] == np.arange(count)[:, None]) & self.own[:, None]
        last = np.where(mine, place, -1).max(axis=2)
        return np.where(last < 0, self.end[:, None], last)

    @property
    def own(self) -> Bools:
        """`[batch, sequence]` tokens of the prompt itself: no padding, and nothing after its end."""
        return self.real & (np.arange(self.real.shape[1]) <= self.end[:, None])


@dataclass(frozen=True, eq=False)
class Image:
    """One picture's, or one video's, tokens in the sequence of this call.

    Attributes:
        sample: batch row.
        ordinal: n-th picture or video of that row, from 0.
        places: `[visual]` indices into the call's sequence, rising, on the host.
        places_on_device: the same on the device.
        segment: which of several samples in that row it belongs to.
        frame: `[visual]` the frame of a video that each token shows, rising from 0, on the host; None of a picture.
        times: seconds at which each frame of a video is shown, NaN where unknown; empty of a picture.
    """

    sample: int
    ordinal: int
    places: np.ndarray[Any, Any]
    places_on_device: Tensor
    segment: int = 0
    frame: np.ndarray[Any, Any] | None = None
    times: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def frames(self) -> int:
        """Frames of a video; 0 of a picture."""
        return len(self.times)


@dataclass(frozen=True, eq=False)
class Layout:
    """The visual tokens of one forward call.

    Attributes:
        images: every picture, in the order of rows, then of tokens.
        real: `[batch, sequence]` bool, False on padding and on everything else that the call's mask hides.
        counts: tokens of each row that are not masked, on the host.
    """

    images: tuple[Image, ...]
    real: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def find(
        prompt: Tokens,
        tokens_per_image: Sequence[int],
        device: torch.device,
        joins: Callable[[Sequence[int]], bool] | None = None,
    ) -> Layout:
        """Split the visual tokens of a batch into pictures.

        Args:
            prompt: the tokens.
            tokens_per_image: tokens of each picture, or of each crop of one, in the order of the batch; 0 is no picture.
            device: for `Image.places_on_device`.
            joins: whether two crops are of one picture, from the ids between them; None if there are no crops.

        Raises:
            UsageError: the placeholders and the pictures do not match, in total or in one row.
        """
        rows, columns = prompt.placeholders.nonzero()
        if rows.size != sum(tokens_per_image):
            raise UsageError(
                f"image tokens do not match the pictures: the prompt has {rows.size} image tokens, but the "
                f"{len(tokens_per_image)} picture(s) make {sum(tokens_per_image)} ({_counts(tokens_per_image)}); "
                + _why(prompt, rows.size, sum(tokens_per_image))
            )
        images: list[Image] = []
        on_the_device = on_device(columns, device)
        start = ordinal = 0
        for count in _pictures(prompt, rows, columns, [count for count in tokens_per_image if count], joins):
            here = slice(start, start + count)
            row, last = int(rows[start]), int(rows[start + count - 1])
            if row != last:
                raise UsageError(
                    f"image tokens do not match the pictures: picture {len(images)} makes {count} tokens, but they would "
                    f"be spread over samples {row} and {last}; each sample needs the placeholders of its own pictures."
                )
            ordinal = ordinal + 1 if images and images[-1].sample == row else 0
            segments = prompt.segment(row)[columns[here]]
            if segments[0] != segments[-1]:
                raise UsageError(
                    f"the tokens of picture {len(images)} lie in two packed samples of row {row}, which cannot see each other. "
                    "Restart position ids, and separate masks, only between samples."
                )
            images.append(Image(row, ordinal, columns[here], on_the_device[here], int(segments[0])))
            start += count
        return Layout(tuple(images), on_device(prompt.real, device), tuple(prompt.real.sum(axis=1).tolist()))

    def without(self, dropped: Bools) -> Layout:
        """The same pictures without the tokens at some places `[batch, sequence]`."""
        images = []
        for image in self.images:
            places = image.places[~dropped[image.sample, image.places]]
            device = image.places_on_device.device
            images.append(replace(image, places=places, places_on_device=on_device(places, device)))
        return Layout(tuple(images), self.real, self.counts)

    @property
    def first_text_place(self) -> dict[tuple[int, int], int]:
        """Of every sample with a picture (row, and which of several in it), the first place after its last picture."""
        return {(image.sample, image.segment): int(image.places[-1]) + 1 for image in self.images}


def group_by_size(sizes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indices of equal entries together, in order of first appearance: pictures of one size are decided in one batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return list(groups.values())


def real_tokens(attention_mask: Tensor | None, batch: int, sequence: int, device: torch.device) -> Tensor:
    """`[batch, sequence]` bool of the call's own columns (the last `sequence`) of a 2-D mask over all tokens so far."""
    if attention_mask is None:
        return torch.ones(batch, sequence, dtype=torch.bool, device=device)
    return attention_mask[:, -sequence:].to(device=device, dtype=torch.bool)


def _pictures(
    prompt: Tokens,
    rows: np.ndarray[Any, Any],
    columns: np.ndarray[Any, Any],
    crops: Sequence[int],
    joins: Callable[[Sequence[int]], bool] | None,
) -> list[int]:
    """Tokens of each picture, whose crops have `crops` tokens.

    Args:
        rows, columns: `[visual]` of all placeholders.
        joins: as in `Layout.find`.
    """
    if joins is None:
        return list(crops)
    pictures: list[int] = []
    end = 0
    for count in crops:
        row = rows[end]
        if end and rows[end - 1] == row and joins(prompt.ids[row, columns[end - 1] + 1 : columns[end]].tolist()):
            pictures[-1] += count
        else:
            pictures.append(count)
        end += count
    return pictures


def _why(prompt: Tokens, there: int, wanted: int) -> str:
    """What probably happened to the placeholders, and what to do."""
    last = prompt.placeholders[np.arange(len(prompt.end)), prompt.end]
    if there < wanted and last.any():
        return (
            f"row {int(last.argmax())} ends with an image token, as a prompt does that was cut inside a picture: give the "
            "processor a larger max_length, or no truncation."
        )
    if not there:
        return (
            "put one image placeholder in the text for each picture, and let neither the processor's truncation nor your own "
            "cut it off."
        )
    return "put one image placeholder in the text for each picture and let the processor expand it."


def _counts(counts: Sequence[int]) -> str:
    shown = ", ".join(map(str, counts[:8]))
    return shown + (", …" if len(counts) > 8 else "")
