"""Stage 1 of the training on clips: pooling and projector learn to write the designed code of cells of 2x2 patches.

The vision tower is the picture model's and stays as it is.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaNextVideoForConditionalGeneration

from vlmprune.tiny.architecture import TEXT_WIDTH
from vlmprune.tiny.clips import FRAMES, Clip, compose_clip
from vlmprune.tiny.scenes import SIZE
from vlmprune.tiny.training.clip_cells import cell_target
from vlmprune.tiny.training.code import COORDINATE_GAIN, FIELDS, SCALE, THIRD_GAIN, directions

_SHARPNESS = 10.0


def frame_pixels(clips: list[Clip]) -> Tensor:
    """Normalised frames of the clips as the processor makes them: `[B * FRAMES, 3, SIZE, SIZE]`."""
    stacked = np.stack([np.asarray(frame, np.float32) for clip in clips for frame in clip.frames()])
    return torch.from_numpy((stacked / 255 - 0.5) / 0.25).permute(0, 3, 1, 2).contiguous()


def patches(model: LlavaNextVideoForConditionalGeneration, frames: Tensor) -> Tensor:
    """Features of the patches from the frozen tower: `[n, P, V]`."""
    with torch.no_grad():
        return model.model.vision_tower(frames, output_hidden_states=True).hidden_states[-2][:, 1:]


def pooled(model: LlavaNextVideoForConditionalGeneration, features: Tensor) -> Tensor:
    """Visual tokens from the features of patches: `[n, P, V]` -> `[n, C, D]`."""
    return model.model.multi_modal_projector(model.model.vision_resampler(features))


def initialise_pooling(model: LlavaNextVideoForConditionalGeneration) -> None:
    """Let the pooling take the mean of the patches."""
    convolution = model.model.vision_resampler.pool
    with torch.no_grad():
        across = torch.eye(convolution.weight.shape[0]) / convolution.weight[0, 0].numel()
        convolution.weight.copy_(across[:, :, None, None].expand_as(convolution.weight))
        convolution.bias.zero_()


class PoolingStage:
    """Loss of one batch of frames; see `vlmprune.tiny.training.loop` for the contract of a stage."""

    name = "pooling"

    def __init__(self, model: LlavaNextVideoForConditionalGeneration, batch: int) -> None:
        initialise_pooling(model)
        self.model, self.batch = model, batch
        self.trained = nn.ModuleDict({"pool": model.model.vision_resampler, "projector": model.model.multi_modal_projector})
        self._directions = directions(TEXT_WIDTH)

    def loss(self, seed: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(seed)
        clips = [compose_clip(seed + index) for index in range(self.batch)]
        chosen = [rng.randrange(FRAMES) for _ in clips]
        known = [cell_target(clip.objects(frame)) for clip, frame in zip(clips, chosen, strict=True)]
        frames = frame_pixels(clips)[[FRAMES * index + frame for index, frame in enumerate(chosen)]]
        tokens = pooled(self.model, patches(self.model, frames)).float().flatten(0, 1)
        code, core, clear = (
            torch.from_numpy(np.concatenate([getattr(each, name) for each in known])) for name in ("code", "core", "clear")
        )
        owned = torch.from_numpy(np.concatenate([each.object_of >= 0 for each in known]))
        said = tokens @ self._directions.T / SCALE
        error = (tokens / SCALE - code @ self._directions).square().sum(1)
        weight = clear * torch.where(code[:, FIELDS["background"].start] == 0, 1.0, 0.15)
        logits, place = _SHARPNESS * said, FIELDS["xy"]

        def classes(name: str, rows: Tensor, gain: float = 1.0) -> Tensor:
            return functional.cross_entropy(logits[rows, FIELDS[name]] / gain, code[rows, FIELDS[name]].argmax(1))

        def flags(field: slice, rows: Tensor) -> Tensor:
            return functional.binary_cross_entropy_with_logits(logits[rows, field] - _SHARPNESS / 2, code[rows, field])

        terms = {
            "code": (error * weight).sum() / weight.sum(),
            "xy": 8 * functional.mse_loss(said[core, place], code[core, place]),
            "colour": classes("colour", owned),
            "shape": classes("shape", core),
            "column": 0.3 * classes("column", core, THIRD_GAIN),
            "row": 0.3 * classes("row", core, THIRD_GAIN),
            "centre": flags(FIELDS["centre"], owned),
            "kind": flags(slice(FIELDS["background"].start, FIELDS["sign"].stop), clear),
        }
        told = said.detach()

        def right(name: str, rows: Tensor) -> float:
            return (told[rows, FIELDS[name]].argmax(1) == code[rows, FIELDS[name]].argmax(1)).float().mean().item()

        is_centre = FIELDS["centre"].start
        return torch.stack(list(terms.values())).sum(), {
            "error": error[(weight == 1)].mean().item(),
            "colour": right("colour", owned),
            "shape": right("shape", core),
            "centre": ((told[owned, is_centre] > 0.5) == (code[owned, is_centre] > 0.5)).float().mean().item(),
            "xy": (told[core, place] - code[core, place]).abs().mean().item() * SIZE / 2 / COORDINATE_GAIN,
        }
