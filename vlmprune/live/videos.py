"""The videos of a call: how many tokens each has, and which frame every token shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from vlmprune.adapters.family import Family, has_mrope
from vlmprune.adapters.videos import Clip, Numbers
from vlmprune.device import on_host
from vlmprune.errors import UsageError
from vlmprune.live.choosing import BoundStage
from vlmprune.live.layout import Image, Layout


def sizes_of(encoded: Any) -> list[int]:
    """Rows of each entry of what the tower returned for pictures or videos.

    Raises:
        UsageError: they come in pieces.
    """
    if encoded.last_hidden_state is None:  # generate() cuts features up for a chunked prefill, and leaves this out
        raise UsageError(
            "pruning decides over whole pictures, but these features come in pieces, as generate(prefill_chunk_size=…) cuts "
            "them, whether the prompt has one chunk or several: leave prefill_chunk_size out, and pass on what "
            "get_image_features returned as it is."
        )
    return [features.shape[0] for features in encoded.pooler_output]


def videos_of(family: Family, encoded: Any, kwargs: Mapping[str, Any], config: Any) -> list[int] | None:
    """Visual tokens of each video of a call; None if it brings none.

    Args:
        encoded: what `generate` has encoded already, or None.
        kwargs: the base model's arguments.

    Raises:
        UsageError: videos of this family are not supported.
    """
    if encoded is None and kwargs.get("pixel_values_videos") is None:
        return None
    if (known := family.videos) is None:
        raise UsageError(
            f"videos of {family.name} are not supported: pass the frames as pictures, or run this prompt inside "
            "`with run.override(enabled=False):`."
        )
    if encoded is not None:
        return known.entries(sizes_of(encoded), kwargs)
    if (counts := known.tokens(kwargs, config)) is None:
        raise UsageError(
            "this call has the pixels of a video, but not what says how many frames they make, and how large these are: pass "
            "on everything that the processor returned."
        )
    return counts


def video_placeholder(family: Family, config: Any, pictures: Sequence[int] | None, videos: Sequence[int] | None) -> int | None:
    """Id of the placeholder of videos; None if a call's placeholders are pictures' for sure.

    Raises:
        UsageError: pictures and videos have the same placeholder, and the call has both.
    """
    if family.videos is None:
        return None
    token = family.videos.token(config)
    if token != family.image_token(config):
        return token
    if pictures and videos:
        raise UsageError(
            f"pictures and videos of {family.name} have the same placeholder, so that transformers cannot tell them apart in "
            "one call: ask about them one after the other."
        )
    return token if videos is not None else None


def with_frames(layout: Layout, family: Family, kwargs: Mapping[str, Any], config: Any) -> Layout:
    """The same pictures and videos, with the frames of the videos.

    Args:
        kwargs: the base model's arguments.

    Raises:
        UsageError: the frames do not match the prompt.
    """
    assert family.videos is not None
    videos = [number for number, image in enumerate(layout.images) if image.frames]
    grids, positions = family.videos.grids(kwargs, config), _positions(kwargs, config, layout.real.shape[1])
    images = list(layout.images)
    for ordinal, number in enumerate(videos):
        image = images[number]
        clip = Clip(ordinal, len(videos), image.places, _of_image(positions, image), kwargs, config)
        frame = family.videos.frame(clip)
        given = grids[ordinal][0] if grids is not None and len(grids) == len(videos) else None
        _check_frames(frame, given, len(image), ordinal, family.videos.uneven)
        assert frame is not None
        times = family.videos.times(clip, int(frame[-1]) + 1)
        images[number] = replace(image, frame=frame.astype(np.int64), times=tuple(map(float, times)))
    return replace(layout, images=tuple(images))


def check_budgets(stages: Sequence[BoundStage], layout: Layout, said: bool) -> None:
    """Refuse budgets per frame for pictures, and methods that compare frames which are not alike, or not known.

    Args:
        said: the pictures are among the embeddings, and their caller says where (`image_positions`).

    Raises:
        UsageError: a stage counts frames, and a picture of the prompt has none; or its method compares frames, and nothing says
            which tokens are frames, or those of a video have different numbers of tokens.
    """
    name = next((bound.method.name for bound in stages if bound.per_frame), None)
    if name is not None and any(not image.frames for image in layout.images):
        raise UsageError(
            f'{name} has a budget for each frame (per="frame"), but this prompt has a picture, which has no frames: leave per '
            "out, or ask about the picture in a prompt without this recipe."
        )
    name = next((bound.method.name for bound in stages if bound.method.compares_frames), None)
    if name is not None and said:
        raise UsageError(
            f"{name} compares the frames of a video, and image_positions says where pictures are, but not which tokens are "
            "frames of a video: pass input_ids with the video, or choose a method that compares no frames."
        )
    for image in layout.images if name is not None else ():
        if image.frame is not None and not _alike(sizes := np.bincount(image.frame)):
            raise UsageError(
                f"{name} compares the frames of a video, token by token, but frames of this one have from {min(sizes)} to "
                f"{max(sizes)} tokens: its processor has left some out. Choose another method, or keep them "
                "(use_token_compression=False)."
            )


def _check_frames(frame: Numbers | None, given: int | None, visual: int, video: int, uneven: bool) -> None:
    """Refuse frames that do not match the prompt.

    Args:
        frame: `[visual]` the frame that each token shows, or None.
        given: how many frames the call says that there are, or None.
        visual: tokens of the video.
        video: its number in the call.
        uneven: frames may have different numbers of tokens.
    """
    if frame is None:
        raise UsageError(
            f"the frames of video {video} cannot be told: its {visual} tokens are no whole number of frames, and neither a "
            "grid nor rotary positions say how they are arranged; pass on everything that the processor returned."
        )
    sizes = np.bincount(frame)
    wanted = "put one placeholder in the text for each video and let the processor expand it."
    if given is not None and len(sizes) != given:
        raise UsageError(
            f"the frames of video {video} do not match the prompt: the video has {given} frames, but its tokens stand in "
            f"{len(sizes)} groups; {wanted}"
        )
    if not uneven and not _alike(sizes):
        raise UsageError(
            f"the frames of video {video} do not match the prompt: they have {', '.join(map(str, sizes[:8]))}"
            f"{', …' if len(sizes) > 8 else ''} tokens, and all frames of a video have the same number; {wanted}"
        )


def _alike(sizes: Numbers) -> bool:
    """Whether frames have the same number of tokens. The last one may have the separator of the video, too."""
    return len(set(sizes[:-1].tolist())) <= 1 and sizes[-1] - sizes[0] in (0, 1)


def _positions(kwargs: Mapping[str, Any], config: Any, sequence: int) -> Callable[[], Numbers | None]:
    """Gives `[3, batch, sequence]` rotary positions in time, rows and columns, if the call states them."""

    @cache
    def read() -> Numbers | None:
        given = kwargs.get("position_ids")
        if not isinstance(given, Tensor) or given.ndim != 3 or not has_mrope(config.get_text_config()):
            return None
        return on_host(given[-3:, :, -sequence:])

    return read


def _of_image(positions: Callable[[], Numbers | None], image: Image) -> Callable[[], Numbers | None]:
    """Gives those of one video."""

    def read() -> Numbers | None:
        every = positions()
        return None if every is None else every[:, min(image.sample, every.shape[1] - 1), image.places]

    return read
