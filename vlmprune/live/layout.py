"""Where the visual tokens of one forward call are: per sample, per image.

Everything that depends on a prompt's shape is decided here once, so that neither methods nor hooks assume one image, one
batch row, or a fixed number of prefix tokens.

A prompt is read from the device to the host once, before the first layer (`Tokens.read`). Everything shapes depend on is known
from there, so that nothing waits for the device while layers run. What is on the host is NumPy, what is on the device is torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device, on_host
from vlmprune.errors import UsageError

Bools = np.ndarray[Any, np.dtype[np.bool_]]
NOT_YET = torch.zeros(0, dtype=torch.long)
"""Places that are on the host, and not yet on the device."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one call, on the host.

    Attributes:
        ids: `[batch, sequence]`; where only embeddings were given, numbers that are equal for equal ones.
        real: `[batch, sequence]` False on what the call's mask hides: padding, or any other token, pictures' too.
        placeholders: `[batch, sequence]` True on placeholders of pictures and videos, masked or not.
        end: `[batch]` place of the last token that belongs to the prompt.
        segments: `[batch, sequence]` which of several samples in one row each token belongs to, from 0; None if every row is
            one sample.
        videos: `[batch, sequence]` those of `placeholders` that are videos'; None if none is.
    """

    ids: np.ndarray[Any, Any]
    real: Bools
    placeholders: Bools
    end: np.ndarray[Any, Any]
    segments: np.ndarray[Any, Any] | None = None
    videos: Bools | None = None

    @staticmethod
    def read(ids: Tensor, mask: Tensor | None, image_token: int, tail: int, video_token: int | None = None) -> Tokens:
        """One transfer from the device, which waits for it.

        Args:
            ids: `[batch, sequence]`.
            mask: `[batch, sequence or more]`, 0 on padding; its last columns are those of `ids`.
            image_token: id of the placeholder of pictures.
            tail: tokens at the end that are not part of the prompt.
            video_token: id of the placeholder of videos, if there may be some.
        """
        if mask is None:
            known = on_host(ids)
            real = np.ones(known.shape, dtype=bool)
        else:
            sequence = ids.shape[1]
            known, seen = on_host(torch.stack((ids, (mask[:, -sequence:] != 0).to(ids))))
            real = seen != 0
        videos = None if video_token is None else known == video_token
        return Tokens.of(known, real, known == image_token, tail, videos=videos)

    @staticmethod
    def of(
        ids: np.ndarray[Any, Any],
        real: Bools,
        placeholders: Bools,
        tail: int = 0,
        segments: np.ndarray[Any, Any] | None = None,
        videos: Bools | None = None,
    ) -> Tokens:
        """A prompt whose last token, of each row, is `tail` tokens before the last that is there. `placeholders` need not have
        those of `videos`."""
        end = np.where(real, np.arange(real.shape[1]), 0).max(axis=1) - tail
        if videos is not None:
            placeholders = placeholders | videos
        return Tokens(ids, real, placeholders, end, segments, videos if videos is not None and videos.any() else None)

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

    @property
    def shown(self) -> dict[str, Any]:
        """`frame` and `times` as a record keeps them."""
        return {"frame": None if self.frame is None else torch.from_numpy(self.frame.copy()), "times": self.times}


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
        tokens_per_video: Sequence[int] = (),
    ) -> Layout:
        """Split the visual tokens of a batch into pictures and videos.

        Args:
            prompt: the tokens.
            tokens_per_image: tokens of each picture, or of each crop of one, in the order of the batch; 0 is no picture.
            device: for `Image.places_on_device`.
            joins: whether two crops are of one picture, from the ids between them; None if there are no crops.
            tokens_per_video: tokens of each video, in the order of the batch. Their frames are not known here.

        Raises:
            UsageError: the placeholders and the pictures, or videos, do not match, in total or in one row.
        """
        videos = prompt.videos
        images = _placed(
            prompt, prompt.placeholders if videos is None else prompt.placeholders & ~videos, tokens_per_image, joins
        )
        if videos is not None or tokens_per_video:
            there = np.zeros_like(prompt.placeholders) if videos is None else videos
            images += [replace(video, times=(math.nan,)) for video in _placed(prompt, there, tokens_per_video, None, "video")]
            images.sort(key=lambda image: (image.sample, image.places[0]))
        ordinals: dict[int, int] = {}
        every = on_device(np.concatenate([image.places for image in images] or [np.zeros(0, int)]), device)
        ends = np.cumsum([len(image) for image in images]).tolist()
        placed = []
        for image, end in zip(images, ends, strict=True):
            ordinal = ordinals.get(image.sample, 0)
            ordinals[image.sample] = ordinal + 1
            placed.append(replace(image, ordinal=ordinal, places_on_device=every[end - len(image) : end]))
        return Layout(tuple(placed), on_device(prompt.real, device), tuple(prompt.real.sum(axis=1).tolist()))

    def without(self, dropped: Bools) -> Layout:
        """The same pictures without the tokens at some places `[batch, sequence]`."""
        images = []
        for image in self.images:
            stays = ~dropped[image.sample, image.places]
            places, device = image.places[stays], image.places_on_device.device
            frame = None if image.frame is None else image.frame[stays]
            images.append(replace(image, places=places, places_on_device=on_device(places, device), frame=frame))
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


def _placed(
    prompt: Tokens,
    there: Bools,
    counts: Sequence[int],
    joins: Callable[[Sequence[int]], bool] | None,
    what: str = "image",
) -> list[Image]:
    """The pictures, or videos, of a prompt, by the places of their placeholders; their ordinals are not known yet.

    Args:
        there: `[batch, sequence]` the placeholders.
        counts: tokens of each, or of each crop.
        joins: as in `Layout.find`.
        what: "image" or "video".

    Raises:
        UsageError: they do not match.
    """
    rows, columns = there.nonzero()
    kind = "picture" if what == "image" else what
    if rows.size != sum(counts):
        raise UsageError(
            f"{what} tokens do not match the {kind}s: the prompt has {rows.size} {what} tokens, but the {len(counts)} "
            f"{kind}(s) make {sum(counts)} ({_counts(counts)}); " + _why(prompt, there, sum(counts), kind)
        )
    images: list[Image] = []
    start = 0
    for count in _pictures(prompt, rows, columns, [count for count in counts if count], joins):
        here = slice(start, start + count)
        row, last = int(rows[start]), int(rows[start + count - 1])
        if row != last:
            raise UsageError(
                f"{what} tokens do not match the {kind}s: {kind} {len(images)} makes {count} tokens, but they would be spread "
                f"over samples {row} and {last}; each sample needs the placeholders of its own {kind}s."
            )
        segments = prompt.segment(row)[columns[here]]
        if segments[0] != segments[-1]:
            raise UsageError(
                f"the tokens of {kind} {len(images)} lie in two packed samples of row {row}, which cannot see each other. "
                "Restart position ids, and separate masks, only between samples."
            )
        images.append(Image(row, 0, columns[here], NOT_YET, int(segments[0])))
        start += count
    return images


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


def _why(prompt: Tokens, there: Bools, wanted: int, kind: str) -> str:
    """What probably happened to the placeholders, and what to do."""
    last, token = there[np.arange(len(prompt.end)), prompt.end], "an image" if kind == "picture" else "a video"
    if there.sum() < wanted and last.any():
        return (
            f"row {int(last.argmax())} ends with {token} token, as a prompt does that was cut inside a {kind}: give the "
            "processor a larger max_length, or no truncation."
        )
    one = f"put one {token.split()[1]} placeholder in the text for each {kind}"
    if not there.any():
        return f"{one}, and let neither the processor's truncation nor your own cut it off."
    return f"{one} and let the processor expand it."


def _counts(counts: Sequence[int]) -> str:
    shown = ", ".join(map(str, counts[:8]))
    return shown + (", …" if len(counts) > 8 else "")
