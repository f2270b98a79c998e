"""What a model's video processor makes of frames, without torchvision, which transformers' own video processors need.

They resize, rescale and normalise with torchvision's functions on tensors, which are torch's: the same numbers come from torch
alone. `FramesProcessor` takes the place of the processor's part for videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

from vlmprune.errors import UsageError

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of ways to resize, in torch's words."""


@dataclass(frozen=True)
class Kind:
    """One kind of video processor.

    Attributes:
        settings: what the checkpoint's file may leave out.
        resized: module of transformers whose `smart_resize` says how large a frame becomes; empty if the settings say it.
        whole: that function counts the pixels of all frames together.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    resized: str = ""
    whole: bool = False

    @property
    def packed(self) -> bool:
        """Patches of all frames are rows of one tensor, with a grid; else frames stay pictures."""
        return bool(self.resized)


PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
_QWEN2 = Kind(
    {**CLIP, "size": {"shortest_edge": 100352, "longest_edge": 602112}, **PATCHES},
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
)
_QWEN3 = Kind(
    {**HALF, "size": {"shortest_edge": 131072, "longest_edge": 786432}, **PATCHES, "patch_size": 16},
    "transformers.models.qwen3_vl.video_processing_qwen3_vl",
    whole=True,
)
_GLM4V = Kind(
    {**CLIP, "size": {"shortest_edge": 12544, "longest_edge": 47040000}, **PATCHES},
    "transformers.models.glm4v.video_processing_glm4v",
    whole=True,
)
KINDS: dict[str, Kind] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "glm4v": _GLM4V,
    "glm4v_moe": _GLM4V,
    "llava_onevision": Kind({**CLIP, "size": {"height": 384, "width": 384}}),
    "llava_next_video": Kind(
        {**CLIP, "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    ),
}
"""By the model's type."""


class FramesProcessor:
    """The part of a processor that takes videos.

    Args:
        kind: which transformers' own it stands for.
        read: gives the settings of the checkpoint; what they leave out is the kind's. They are read at the first video, so
            that they cannot disturb questions about pictures.

    Raises:
        UsageError: at the first video, the settings cannot be read, or need torchvision.
    """

    valid_kwargs = None
    """As of transformers' own; there are no others than those of every processor."""

    def __init__(self, kind: Kind, read: Callable[[], dict[str, Any]]) -> None:
        self._kind, self._read = kind, read

    @cached_property
    def _settings(self) -> dict[str, Any]:
        usual = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}
        own = self._read()
        settings = usual | self._kind.settings | {key: value for key, value in own.items() if value is not None}
        if self._kind.packed:
            size = {key: value for key, value in settings["size"].items() if value is not None}
            for edge, pixels in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):  # of earlier files
                size[edge] = own.get(pixels) or size[edge]
            settings["size"] = size
        if settings.get("cap_pixels_per_frame") or settings["resample"] not in MODES:
            raise UsageError(
                "this model's video processor has settings that need torchvision (cap_pixels_per_frame, or a resample other "
                "than nearest, bilinear and bicubic): install the version that belongs to this torch."
            )
        return settings

    def __getattr__(self, name: str) -> Any:
        """Settings, which processors read: `merge_size`, `temporal_patch_size`."""
        if name.startswith("_") or name not in self._settings:
            raise AttributeError(name)
        return self._settings[name]

    def __call__(self, videos: Sequence[Any], video_metadata: Any = None, return_metadata: bool = False, **kwargs: Any) -> Any:
        """Inputs of a model.

        Args:
            videos: of each, `[frame, row, column, 3]` uint8.
            video_metadata: of each, what `Video.metadata` gives.
            return_metadata: put it into the output, from which processors write times into the prompt.
            kwargs: others that transformers passes on; frames were chosen before.
        """
        import torch
        from transformers import BatchFeature
        from transformers.video_utils import make_batched_metadata

        frames = [self._normalised(torch.from_numpy(video).permute(0, 3, 1, 2)) for video in videos]
        if self._kind.packed:
            found, grids = zip(*map(self._patches, frames), strict=True)
            data: dict[str, Any] = {"pixel_values_videos": torch.cat(found), "video_grid_thw": torch.tensor(grids)}
        else:
            if len({tuple(own.shape) for own in frames}) > 1:
                counts = ", ".join(str(len(own)) for own in frames)
                raise ValueError(
                    f"its videos of one batch need the same number of frames, found {counts}; ask one at a time (--batch 1)"
                )
            data = {"pixel_values_videos": torch.stack(frames)}
        if return_metadata:
            data["video_metadata"] = make_batched_metadata(list(videos), video_metadata=video_metadata)
        return BatchFeature(data)

    def _normalised(self, frames: Any) -> Any:
        """`[frame, channel, row, column]` fp32, resized and cropped, from uint8."""
        import torch
        from torch.nn.functional import interpolate

        if self.do_resize:
            mode, size = MODES[self.resample], self._size(len(frames), *frames.shape[-2:])
            frames = interpolate(frames, size=size, mode=mode, **({} if "nearest" in mode else {"antialias": True}))
        if self._settings.get("do_center_crop"):
            frames = _centre(frames, self.crop_size["height"], self.crop_size["width"])
        scale = self.rescale_factor if self.do_rescale else 1.0
        if not self.do_normalize:
            return frames * scale
        mean, spread = (torch.tensor(values) * (1 / scale) for values in (self.image_mean, self.image_std))
        return (frames.float() - mean.view(3, 1, 1)) / spread.view(3, 1, 1)

    def _size(self, count: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of a resized frame."""
        size = self.size
        if self._kind.packed:
            wanted = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
            if self._kind.whole:
                wanted |= {"num_frames": count, "temporal_factor": self.temporal_patch_size}
            factor = self.patch_size * self.merge_size
            resized: Callable[..., tuple[int, int]] = import_module(self._kind.resized).smart_resize
            return resized(height=height, width=width, factor=factor, **wanted)
        if (edge := size.get("shortest_edge")) is not None:
            short, long = sorted((height, width))
            scaled = int(edge * long / short)
            return (edge, scaled) if height <= width else (scaled, edge)
        return size["height"], size["width"]

    def _patches(self, frames: Any) -> tuple[Any, list[int]]:
        """Patches `[patch, values]` of a video, square by square of those that become one token; and their grid."""
        import torch

        time, side, merge = self.temporal_patch_size, self.patch_size, self.merge_size
        if missing := -len(frames) % time:
            frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
        grid = [len(frames) // time, frames.shape[2] // side, frames.shape[3] // side]
        cut = frames.unflatten(0, (-1, time)).unflatten(3, (-1, merge, side)).unflatten(6, (-1, merge, side))
        # [time, in time, channel, row, in square, in patch, column, in square, in patch]
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5, 8).flatten(0, 4), grid


def _centre(frames: Any, height: int, width: int) -> Any:
    """The middle of `[frame, channel, row, column]`; what is smaller is padded with black."""
    from torch.nn.functional import pad

    down, right = max(height - frames.shape[2], 0), max(width - frames.shape[3], 0)
    frames = pad(frames, (right // 2, right - right // 2, down // 2, down - down // 2))
    top, left = (frames.shape[2] - height) // 2, (frames.shape[3] - width) // 2
    return frames[:, :, top : top + height, left : left + width]
