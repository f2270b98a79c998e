"""What families do with a video: its placeholders, and which frame each of its tokens shows.

A model sees a video as a picture with frames. Some models write every frame apart in the prompt, with its time before it;
others write all frames one after the other. What `generate` hands to the model does not always say how many frames there are,
so that frames are told from what every call has: the places of the tokens, their rotary positions, or the size of a frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vlmprune.device import on_host

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Clip:
    """One video of a call.

    Attributes:
        number: n-th video of the call, from 0.
        of: how many videos the call has.
        places: `[visual]` places of its placeholders in its row, rising.
        positions: gives `[3, visual]` their rotary positions in time, rows and columns, if the call states them.
        call: the arguments of the call.
        config: the model's.
    """

    number: int
    of: int
    places: Numbers
    positions: Callable[[], Numbers | None]
    call: Mapping[str, Any]
    config: Any


def _unknown(clip: Clip, frames: int) -> Sequence[float]:
    """No time is known."""
    return [math.nan] * frames


@dataclass(frozen=True)
class Videos:
    """Videos of a family.

    Attributes:
        token: id of the video placeholder, from the config; in some families that of pictures.
        tokens: placeholders of each video, from the arguments of a call with pixels; None if it has none.
        grids: frames of each video, and rows and columns of a frame's tokens, from the processor's output or the arguments of a
            call, and the config; None if these do not say.
        frame: `[visual]` the frame that each token of a video shows, rising from 0; None if nothing in the call says it.
        entries: placeholders of each video, from the sizes of what `get_video_features` returns and the arguments of the call.
        times: seconds at which each frame is shown, of a video with so many frames; NaN where unknown.
        uneven: frames may have different numbers of tokens.
        pool: path, from the base model, of the module that makes squares of patches one token before the projector, of videos
            only; None if there is none.
        pooled: patches on a side of such a square, from the config.
    """

    token: Callable[[Any], int]
    tokens: Callable[[Mapping[str, Any], Any], list[int] | None]
    grids: Callable[[Mapping[str, Any], Any], list[tuple[int, int, int]] | None]
    frame: Callable[[Clip], Numbers | None]
    entries: Callable[[Sequence[int], Mapping[str, Any]], list[int]] = lambda sizes, call: list(sizes)
    times: Callable[[Clip, int], Sequence[float]] = _unknown
    uneven: bool = False
    pool: str | None = None
    pooled: Callable[[Any], int] = lambda config: 1


# -- which frame a token shows -------------------------------------------------------------------------------------------------


def written_apart(clip: Clip) -> Numbers:
    """Every frame is a run of placeholders of its own, with its time, or a marker, before it."""
    return np.asarray((np.diff(clip.places, prepend=clip.places[:1]) > 1).cumsum())


def of_equal_size(size: Callable[[Any], int]) -> Callable[[Clip], Numbers | None]:
    """Every frame has `size(config)` tokens; what is left behind the last one, such as a separator, belongs to it."""

    def frame(clip: Clip) -> Numbers | None:
        tokens, visual = size(clip.config), len(clip.places)
        return np.minimum(np.arange(visual) // tokens, visual // tokens - 1) if visual >= tokens else None

    return frame


def by_grid_or_position(grids: Callable[[Mapping[str, Any], Any], Any]) -> Callable[[Clip], Numbers | None]:
    """From the grid, if the call has one for each video; else a frame begins where rows and columns begin anew."""

    def frame(clip: Clip) -> Numbers | None:
        found, visual = grids(clip.call, clip.config), len(clip.places)
        if found is not None and len(found) == clip.of:
            frames, rows, columns = found[clip.number]
            return np.repeat(np.arange(frames), rows * columns) if frames * rows * columns == visual else None
        positions = clip.positions()
        return None if positions is None else by_position(positions)

    return frame


def by_position(positions: Numbers) -> Numbers | None:
    """`[visual]` frames from rotary positions `[3, visual]`; None if they are not those of a raster."""
    _, row, column = positions
    begins = (np.diff(row) < 0) | ((np.diff(row) == 0) & (np.diff(column) <= 0))
    frame: Numbers = np.concatenate(([0], begins.cumsum()))
    size = len(np.unique(row)) * len(np.unique(column))
    return frame if (np.bincount(frame) == size).all() else None


# -- grids of packed patches (Qwen-VL, GLM) ----------------------------------------------------------------------------------


def packed_grids(call: Mapping[str, Any], config: Any) -> list[tuple[int, int, int]] | None:
    """From `video_grid_thw`."""
    if (grids := call.get("video_grid_thw")) is None:
        return None
    merge = config.vision_config.spatial_merge_size
    return [(frames, rows // merge, columns // merge) for frames, rows, columns in _listed(grids)]


def packed_tokens(call: Mapping[str, Any], config: Any) -> list[int] | None:
    """The same for a call with pixels."""
    grids = packed_grids(call, config)
    return None if grids is None or call.get("pixel_values_videos") is None else [math.prod(grid) for grid in grids]


def _listed(grids: Any) -> list[list[int]]:
    found: list[list[int]] = (on_host(grids) if isinstance(grids, Tensor) else np.asarray(grids)).tolist()
    return found
