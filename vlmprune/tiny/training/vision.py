"""Stage 1: vision tower and projector learn to write the designed code of every patch.

The loss is dense: each of the 144 patches of each picture has its own target. A few ten thousand pictures are therefore enough
to learn from scratch, where captions would need millions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from vlmprune.tiny.architecture import TEXT_WIDTH, VISION_WIDTH
from vlmprune.tiny.scenes import COLOURS, GRID, SHAPES, SIZE, Layout, Scene, compose
from vlmprune.tiny.training.code import COORDINATE_GAIN, DIGIT_SLOTS, FIELDS, SCALE, THIRD_GAIN, Target, directions, target

CROWDED = Layout(objects=(9, 9), signs=4, sign_probability=1.0)
ORDINARY = Layout()
_CROWDED_SHARE = 0.6
_SHARPNESS = 10.0
_COMBINATIONS = len(COLOURS) * len(SHAPES)


def pixels(scenes: list[Scene]) -> Tensor:
    """Normalised pictures as the processor makes them: `[B, 3, SIZE, SIZE]`."""
    stacked = np.stack([np.asarray(scene.image, np.float32) for scene in scenes])
    return torch.from_numpy((stacked / 255 - 0.5) / 0.25).permute(0, 3, 1, 2).contiguous()


def projected(model: LlavaForConditionalGeneration, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens `[B, P, D]` as the language model gets them, and the tower's last two layers `[B, 1 + P, V]`."""
    layers = model.model.vision_tower(pictures, output_hidden_states=True).hidden_states
    return model.model.multi_modal_projector(layers[-2][:, 1:]), layers[-2], layers[-1]


def initialise(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Weights with which attention already compares like with like and depends on position.

    Keys equal queries ("mimetic" initialisation), position embeddings are 2-D sines and cosines at full amplitude, and the
    patch embedding preserves the variance of the pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    width = embeddings.class_embedding.shape[0]
    with torch.no_grad():
        fan_in = embeddings.patch_embedding.weight[0].numel()
        embeddings.patch_embedding.weight.normal_(0, fan_in**-0.5, generator=generator)
        embeddings.class_embedding.normal_(0, 1, generator=generator)
        embeddings.position_embedding.weight.zero_()
        embeddings.position_embedding.weight[1:] = _sines(width)
        for block in tower.encoder.layers:
            for linear in (block.self_attn.q_proj, block.self_attn.v_proj, block.self_attn.out_proj, block.mlp.fc1):
                linear.weight.normal_(0, linear.in_features**-0.5, generator=generator)
            block.self_attn.k_proj.weight.copy_(block.self_attn.q_proj.weight)
            block.mlp.fc2.weight.normal_(0, 0.5 * block.mlp.fc2.in_features**-0.5, generator=generator)
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.weight.normal_(0, linear.in_features**-0.5, generator=generator)
            linear.bias.zero_()


def _sines(width: int) -> Tensor:
    """2-D sine-cosine position embedding of the patch grid: `[GRID * GRID, width]`."""
    waves = width // 4
    frequency = 1 / (30 ** (torch.arange(waves) / waves))
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (columns, rows)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


class _Probes(nn.Module):
    """Readouts that exist only in training: they give the tower a gradient for what the code does not contain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.glyph = nn.Linear(width, 10)
        self.summary = nn.ModuleList(nn.Linear(width, _COMBINATIONS + DIGIT_SLOTS * 10) for _ in range(2))


class VisionStage:
    """Loss of one batch of fresh scenes; see `vlmprune.tiny.training.loop` for the contract of a stage."""

    name = "vision"

    def __init__(self, model: LlavaForConditionalGeneration, seed: int, batch: int) -> None:
        initialise(model, seed)
        torch.manual_seed(seed)
        self.model, self.batch = model, batch
        self.probe = _Probes(VISION_WIDTH)
        self.trained = nn.ModuleDict(
            {
                "tower": model.model.vision_tower,
                "projector": model.model.multi_modal_projector,
                "probe": self.probe,
            }
        )
        self._directions = directions(TEXT_WIDTH)

    def scenes(self, seed: int) -> list[Scene]:
        """The scenes of a batch: crowded ones have more to learn from per picture, ordinary ones are those of the questions."""
        rng = random.Random(seed)
        return [compose(seed + index, CROWDED if rng.random() < _CROWDED_SHARE else ORDINARY) for index in range(self.batch)]

    def loss(self, seed: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        scenes = self.scenes(seed)
        wanted = _Wanted.of([target(scene) for scene in scenes])
        tokens, penultimate, last = (part.float() for part in projected(self.model, pixels(scenes)))
        tokens = tokens.flatten(0, 1)
        said = tokens @ self._directions.T / SCALE
        code_error = (tokens / SCALE - wanted.code @ self._directions).square().sum(1)
        guessed_glyphs = self.probe.glyph(penultimate[:, 1:].flatten(0, 1)[wanted.glyph >= 0])
        terms = {
            **_code_terms(said, code_error, wanted),
            "glyph": functional.cross_entropy(guessed_glyphs, wanted.glyph[wanted.glyph >= 0]),
        }
        summary = torch.from_numpy(np.stack([_summary(scene) for scene in scenes]))
        for number, layer in enumerate((penultimate, last)):
            logits = self.probe.summary[number](layer[:, 0])
            terms[f"summary {number}"] = 3 * functional.binary_cross_entropy_with_logits(logits, summary)
        return torch.stack(list(terms.values())).sum(), _metrics(said.detach(), code_error.detach(), wanted)


@dataclass(frozen=True)
class _Wanted:
    """`Target` of a whole batch as tensors, patches of all pictures in one row: `[B * P, ...]`."""

    code: Tensor
    object_of: Tensor
    core: Tensor
    slots: Tensor
    glyph: Tensor
    clear: Tensor

    @classmethod
    def of(cls, targets: list[Target]) -> _Wanted:
        names = [field.name for field in fields(cls)]
        return cls(*(torch.from_numpy(np.concatenate([getattr(each, name) for each in targets])) for name in names))

    @property
    def owned(self) -> Tensor:
        return self.object_of >= 0

    @property
    def informative(self) -> Tensor:
        return self.code[:, FIELDS["background"].start] == 0


def _digit_logits(logits: Tensor, wanted: _Wanted) -> tuple[Tensor, Tensor]:
    """Logits `[n, 10]` and labels `[n]` of every digit that a patch should encode."""
    known = wanted.slots >= 0
    return logits[:, FIELDS["digits"]].unflatten(1, (DIGIT_SLOTS, 10))[known], wanted.slots[known]


def _code_terms(said: Tensor, code_error: Tensor, wanted: _Wanted) -> dict[str, Tensor]:
    """Losses on the code of the tokens (`[B * P, WIDTH]`): close to the target, and its classes clearly separated."""

    def classes(name: str, rows: Tensor, gain: float = 1.0) -> Tensor:
        field = FIELDS[name]
        return functional.cross_entropy(logits[rows, field] / gain, wanted.code[rows, field].argmax(1))

    def flags(field: slice, rows: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits[rows, field] - _SHARPNESS / 2, wanted.code[rows, field])

    logits = _SHARPNESS * said
    core, owned, place = wanted.core, wanted.owned, FIELDS["xy"]
    weight = wanted.clear * torch.where(wanted.informative, 1.0, 0.15)
    return {
        "code": (code_error * weight).sum() / weight.sum(),
        "xy": 8 * functional.mse_loss(said[core, place], wanted.code[core, place]),
        "colour": classes("colour", owned),
        "shape": classes("shape", core),
        "column": 0.3 * classes("column", core, THIRD_GAIN),
        "row": 0.3 * classes("row", core, THIRD_GAIN),
        "digits": functional.cross_entropy(*_digit_logits(logits, wanted)),
        "centre": flags(FIELDS["centre"], owned),
        "kind": flags(slice(FIELDS["background"].start, FIELDS["sign"].stop), wanted.clear),
    }


@torch.no_grad()
def _metrics(said: Tensor, code_error: Tensor, wanted: _Wanted) -> dict[str, float]:
    """Shares of patches with the right code, and the mean error of coordinates in pixels."""

    def right(name: str, rows: Tensor) -> float:
        field = FIELDS[name]
        return (said[rows, field].argmax(1) == wanted.code[rows, field].argmax(1)).float().mean().item()

    core, owned, place, centre = wanted.core, wanted.owned, FIELDS["xy"], FIELDS["centre"]
    digits, labels = _digit_logits(said, wanted)
    return {
        "error": code_error[wanted.informative & wanted.clear].mean().item(),
        "colour": right("colour", owned),
        "shape": right("shape", core),
        "digit": (digits.argmax(1) == labels).float().mean().item(),
        "centre": ((said[owned, centre] > 0.5) == (wanted.code[owned, centre] > 0.5)).float().mean().item(),
        "xy": (said[core, place] - wanted.code[core, place]).abs().mean().item() * SIZE / 2 / COORDINATE_GAIN,
    }


def _summary(scene: Scene) -> np.ndarray:
    """What the CLS token should encode: colour-shape combinations and digits by slot, `[combinations + 30]`."""
    known = np.zeros(_COMBINATIONS + DIGIT_SLOTS * 10, np.float32)
    for thing in scene.objects:
        known[COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)] = 1
    for sign in scene.signs:
        for slot, digit in enumerate(sign.digits):
            known[_COMBINATIONS + 10 * slot + int(digit)] = 1
    return known
