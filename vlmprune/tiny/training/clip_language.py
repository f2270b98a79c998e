"""Stage 2 of the training on clips: the picture model's language model learns to read eight frames.

The visual tokens of a pool of clips are computed once and kept (`encode`). Every batch takes clips from the pool and asks them
new questions, packed as in `vlmprune.tiny.training.language`. Auxiliary losses, whose weight falls to zero, start circuits for
time: a linear probe reads the frame from each visual token, a head attends from a cell of an object to the cells of the same
object in earlier frames, a probe reads from there whether the object is new and how it moved, and two heads attend from a noun
to the frames that the question is about.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaNextVideoForConditionalGeneration

from vlmprune.tiny.architecture import TEXT_WIDTH, VOCABULARY
from vlmprune.tiny.clip_model import CELLS
from vlmprune.tiny.clip_questions import CLIP_SKILLS
from vlmprune.tiny.clips import FRAMES, compose_clip
from vlmprune.tiny.training.clip_packing import VISUAL, ClipBatch, pack_clips, pose_clip
from vlmprune.tiny.training.clip_pooling import frame_pixels, patches, pooled
from vlmprune.tiny.training.language import answer_loss, read
from vlmprune.tiny.training.loop import replace_file

EARLIER_LAYER, EARLIER_HEAD = 1, 3
"""Where a cell attends to the same object in earlier frames."""
TIME_LAYER, HISTORY_LAYER = 2, 3
"""Layers whose input the probes of time and history read."""
NOUN_LAYER = 3
"""Layer in which the first two heads attend from a noun to what it means; the picture model's."""
_HELP, _HELP_UNTIL = 0.3, 0.6
_FEW, _FEW_UNTIL = 128, 0.87
"""Visual tokens of a clip in the first part of the stage, and the share of the stage that this is: background is left out."""
_BLOCK = 100


def adopt(model: LlavaNextVideoForConditionalGeneration, picture_model: LlavaForConditionalGeneration) -> None:
    """Copy the picture model's weights; new words get those of no word in particular, small and random."""
    ours, theirs = model.state_dict(), picture_model.state_dict()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in theirs.items():
            own = ours[name]
            if own.shape != weight.shape:
                own[len(VOCABULARY) :].normal_(0, float(weight.std()) / 2, generator=generator)
                own = own[: len(VOCABULARY)]
            own.copy_(weight)


def encode(model: LlavaNextVideoForConditionalGeneration, seeds: range, folder: Path) -> Tensor:
    """Visual tokens of the clips of these seeds, bfloat16 `[n, FRAMES * C, D]`; blocks that `folder` has are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = []
    for first in range(0, len(seeds), _BLOCK):
        file = folder / f"{first}.pt"
        if not file.exists():
            made = []
            for seed in seeds[first : first + _BLOCK]:
                with torch.no_grad():
                    tokens = pooled(model, patches(model, frame_pixels([compose_clip(seed)])))
                made.append(tokens.flatten(0, 1).to(torch.bfloat16))
            replace_file(file, lambda path, made=made: torch.save(torch.stack(made), path))  # type: ignore[misc]
        blocks.append(torch.load(file, weights_only=True))
    return torch.cat(blocks)


class ClipLanguageStage:
    """Loss of one batch of packed questions; see `vlmprune.tiny.training.loop` for the contract of a stage."""

    name = "clips"

    def __init__(
        self, model: LlavaNextVideoForConditionalGeneration, batch: int, seeds: range, visual: Tensor, seed: int = 0
    ) -> None:
        torch.manual_seed(seed + 2)
        self.model, self.batch = model, batch
        self.probe = nn.ModuleDict({"time": nn.Linear(TEXT_WIDTH, 1), "history": nn.Linear(TEXT_WIDTH, 3)})
        self.trained = nn.ModuleDict({"language": model.model.language_model, "lm_head": model.lm_head, "probe": self.probe})
        self._seeds, self._visual = seeds, visual
        frames = torch.arange(FRAMES).repeat_interleave(CELLS * CELLS)
        self._times = (frames - (FRAMES - 1) / 2) / (FRAMES / 2)

    def loss(self, seed: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(seed)
        chosen = rng.sample(range(len(self._seeds)), self.batch)
        clips = [compose_clip(self._seeds[index]) for index in chosen]
        batch = pack_clips(clips, [pose_clip(clip, rng) for clip in clips])
        help_weight = _HELP * max(0.0, 1 - progress / _HELP_UNTIL)
        helped: dict[str, Tensor] = {}

        visual = self._visual[chosen].float()
        kept = _some_background(batch.shown, seed) if progress < _FEW_UNTIL else torch.arange(VISUAL).expand(self.batch, -1)
        batch = batch.among(kept)
        visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))

        def on_layer(index: int, hidden: Tensor, queries: Tensor, keys: Tensor) -> None:
            if help_weight:
                helped.update(self._help(index, batch, kept, hidden, queries, keys))

        hidden = read(self.model, visual, batch, on_layer, 2 + kept)
        return answer_loss(self.model, hidden, batch, helped, help_weight, CLIP_SKILLS)

    def _help(
        self, layer: int, batch: ClipBatch, kept: Tensor, hidden: Tensor, queries: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """Auxiliary losses of one layer."""
        prefix = 2 + kept.shape[1]
        terms: dict[str, Tensor] = {}
        if layer == EARLIER_LAYER:
            asking = queries[batch.cell_picture, EARLIER_HEAD, 2 + batch.cell].float()
            scores = (keys[:, EARLIER_HEAD, :prefix].float()[batch.cell_picture] @ asking[:, :, None]).squeeze(2)
            later = torch.arange(prefix) > 2 + batch.cell[:, None]
            terms["earlier"] = -(scores.masked_fill(later, -1e4).log_softmax(-1) * batch.earlier).sum(-1).mean()
        if layer == TIME_LAYER:
            guess = self.probe["time"](hidden[:, 2:prefix]).float().squeeze(-1)
            terms["frame"] = 4 * functional.mse_loss(guess, self._times[kept])
        if layer == HISTORY_LAYER:
            guess = self.probe["history"](hidden[batch.cell_picture, 2 + batch.cell]).float()
            terms["new"] = functional.binary_cross_entropy_with_logits(guess[:, 0], batch.history[:, 0])
            terms["moved"] = 4 * functional.mse_loss(guess[:, 1:], batch.history[:, 1:])
        if layer == NOUN_LAYER:
            asking = queries[batch.noun_picture, :2, prefix + batch.noun_token].float()
            scores = torch.einsum("nhd,nhkd->nhk", asking, keys[batch.noun_picture, :2].float())
            allowed = batch.mask[batch.noun_picture, 0, batch.noun_token]
            scores = scores.masked_fill(~allowed[:, None], -1e4).log_softmax(-1)[..., :prefix]
            terms["noun"] = -(scores * batch.noun_wanted).sum(-1).mean()
        return terms


def _some_background(shown: Tensor, seed: int) -> Tensor:
    """Rising indices `[B, n]` of the visual tokens: all that show an object, and random others, so that `n` is the same in all
    rows and at least `_FEW`."""
    count = max(_FEW, int(shown.sum(1).max()))
    chance = torch.rand(shown.shape, generator=torch.Generator().manual_seed(seed % 2**31))
    return (chance + shown).topk(count, dim=1).indices.sort(dim=1).values
