"""Pictures that `inputs_embeds` holds already: their caller says where they are (`run.override(image_positions=…)`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_host
from vlmprune.errors import UsageError, shown

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Merged:
    """The pictures among the embeddings of one call.

    Attributes:
        there: `[batch, sequence]` bool, on the host, true at the tokens of pictures.
        counts: tokens of each picture, in the order of rows, then of tokens.
    """

    there: np.ndarray[Any, np.dtype[np.bool_]]
    counts: list[int]


def read_positions(given: Any) -> Numbers:
    """`[row, token]` as whole numbers: 0 for words, n for the tokens of a row's n-th picture.

    Args:
        given: these numbers; or true and false, where every run of true is a picture.

    Raises:
        UsageError: something else.
    """
    try:
        table = on_host(given) if isinstance(given, Tensor) else np.asarray(given)
    except ValueError:  # rows of different lengths
        table = np.zeros(0)
    if table.ndim != 2 or table.dtype.kind not in "biu":
        raise UsageError(
            "image_positions must be [batch, token]: true at the tokens of pictures, or the number of each token's picture in "
            f"its row (from 1; 0 for words), found {shown(given)}."
        )
    if table.dtype.kind == "b":
        begins = table & ~np.pad(table, ((0, 0), (1, 0)))[:, :-1]
        return np.where(table, begins.cumsum(axis=1), 0)
    numbers = table.astype(np.int64)
    for row, found in enumerate(numbers):
        pictures = found[found != 0]
        if len(pictures) and (pictures[0] != 1 or not np.isin(np.diff(pictures), (0, 1)).all()):
            raise UsageError(
                f"image_positions numbers the pictures of row {row} as {shown(list(dict.fromkeys(pictures.tolist())))}: number "
                "them 1, 2, … in the order of the prompt."
            )
    return numbers


def find_merged(positions: Numbers | None, kwargs: Mapping[str, Any], past: int, brings: bool) -> Merged | None:
    """The pictures that a call's `inputs_embeds` holds, as its caller says; None for a call without embeddings, and where
    nobody says anything.

    Args:
        positions: as `read_positions` returns them, for the whole prompts; `generate` may repeat their rows.
        kwargs: the base model's arguments, all by name.
        past: tokens in the cache.
        brings: the call brings pictures that are not among its embeddings.

    Raises:
        UsageError: what is said does not fit the call.
    """
    if positions is None:
        return None
    embeddings: Tensor | None = kwargs.get("inputs_embeds")
    if embeddings is None:
        if past:
            return None  # the steps after the prompt
        raise UsageError(
            "image_positions says where pictures are in inputs_embeds, but this prompt has input_ids: leave it out, the places "
            "are known from the ids."
        )
    if brings:
        raise UsageError(
            "image_positions says where pictures are in inputs_embeds already, but this call brings pixels or features beside "
            "them: pass either."
        )
    batch, sequence = embeddings.shape[:2]
    rows, length = positions.shape
    if length not in (sequence, past + sequence) or batch % max(rows, 1):
        raise UsageError(
            f"image_positions has the shape {[rows, length]}, the prompt {[batch, past + sequence]}: give every token of every "
            "row its place in it, padding included."
        )
    numbers = positions[:, -sequence:].repeat(batch // rows, axis=0)
    counts = [int(count) for row in numbers for count in np.bincount(row[row != 0] - row[row != 0].min(initial=1))]
    return Merged(numbers != 0, [count for count in counts if count])


def as_placeholders(merged: Merged, device: torch.device) -> Tensor:
    """`[batch, sequence]` bool on a device."""
    return torch.from_numpy(merged.there).to(device)
