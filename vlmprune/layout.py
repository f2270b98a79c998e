"""Where the visual tokens of one forward call are: per sample, per image.

Everything that depends on a prompt's shape is decided here once, so that neither methods nor hooks assume one image, one
batch row, or a fixed number of prefix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.errors import UsageError


@dataclass(frozen=True, eq=False)
class Image:
    """One picture's tokens in the sequence of this call.

    Attributes:
        sample: batch row.
        ordinal: n-th picture of that row, from 0.
        positions: `[visual]` indices into the call's sequence, rising.
    """

    sample: int
    ordinal: int
    positions: Tensor

    def __len__(self) -> int:
        return self.positions.shape[0]


@dataclass(frozen=True, eq=False)
class Layout:
    """The visual tokens of one forward call.

    Attributes:
        images: every picture, in the order of rows, then of tokens.
        real: `[batch, sequence]` bool, False on padding.
    """

    images: tuple[Image, ...]
    real: Tensor

    @staticmethod
    def find(visual: Tensor, tokens_per_image: Sequence[int], real: Tensor) -> Layout:
        """Split the visual tokens of a batch into pictures.

        Args:
            visual: `[batch, sequence]` bool, True on image placeholders.
            tokens_per_image: tokens of each picture, in the order of the batch.
            real: `[batch, sequence]` bool, False on padding.

        Raises:
            UsageError: the placeholders and the pictures do not match, in total or in one row.
        """
        rows, columns = visual.nonzero(as_tuple=True)
        if rows.numel() != sum(tokens_per_image):
            raise UsageError(
                f"image tokens do not match the pictures: the prompt has {rows.numel()} image tokens, but the "
                f"{len(tokens_per_image)} picture(s) make {sum(tokens_per_image)} ({_counts(tokens_per_image)}); put one "
                "image placeholder in the text for each picture and let the processor expand it."
            )
        images: list[Image] = []
        row_of_token = rows.tolist()
        start = ordinal = 0
        for count, positions in zip(tokens_per_image, columns.split(list(tokens_per_image)), strict=True):
            row, last = row_of_token[start], row_of_token[start + count - 1]
            if row != last:
                raise UsageError(
                    f"image tokens do not match the pictures: picture {len(images)} makes {count} tokens, but they would "
                    f"be spread over samples {row} and {last}; each sample needs the placeholders of its own pictures."
                )
            ordinal = ordinal + 1 if images and images[-1].sample == row else 0
            images.append(Image(row, ordinal, positions))
            start += count
        return Layout(tuple(images), real)

    def without(self, dropped: Tensor) -> Layout:
        """The same pictures without the tokens at some positions `[batch, sequence]` (bool)."""
        images = (
            Image(image.sample, image.ordinal, image.positions[~dropped[image.sample, image.positions]])
            for image in self.images
        )
        return Layout(tuple(images), self.real)


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


def _counts(counts: Sequence[int]) -> str:
    shown = ", ".join(map(str, counts[:8]))
    return shown + (", …" if len(counts) > 8 else "")
