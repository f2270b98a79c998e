"""CDPruner. Zhang et al., NeurIPS 2025, arXiv:2506.10967. Diversity, conditioned on the question: a determinantal point
process.

    S = argmax_{|S|=K} det L_S, greedily;   L_ij = r_i · cos(x_i, x_j) · r_j
    r = relevance, scaled to [10⁻⁶, 1] within each picture

Relevance is that of the paper where a CLIP model is given (`relevance=ClipRelevance(…)`): minus the mean cosine of the patch's
and the question's CLIP embeddings. Without one it is the mean cosine of the token with the embeddings of the words behind the
picture, as ports to models without CLIP do (`embedding` variant; inferred, not the paper's). Differs from the official code
in: scaling per picture (there over the batch), row separators and un-padding of LLaVA-NeXT stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.errors import UsageError
from vlmprune.kernels.select_diverse import determinant_order
from vlmprune.methods.base import Pruner
from vlmprune.methods.relevance import check_relevance, check_width
from vlmprune.schedule import Schedule, Stage, at
from vlmprune.view import Facts, View

Relevance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From `tower_features` `[image, visual, dim]`, `text_ids` `[image, text]` and `text_valid` to `[image, visual]`."""


@dataclass(frozen=True, kw_only=True)
class CDPruner(Pruner):
    """Keep diverse tokens, the relevant ones first.

    Args:
        relevance: scores patches by the question, for example `ClipRelevance`; token and word embeddings are compared if None.
    """

    name = "cdpruner"
    paper = "arXiv:2506.10967 (NeurIPS 2025)"
    note = "relevance from the model's own embeddings unless a CLIP model is given"
    needs = frozenset({"features", "text_features", "text_valid"})
    official_positions = "compact"
    default = at(layer=0, tokens=64)
    per_view = True

    relevance: Relevance | None = None

    def __post_init__(self, layer: int | None, tokens: int | None, fraction: float | None, preset: str | None) -> None:
        super().__post_init__(layer, tokens, fraction, preset)
        if self.relevance is not None:
            check_relevance(self.name, self.relevance)

    def plan(self, facts: Facts) -> Schedule:
        if self.relevance is not None and not facts.cls:
            raise UsageError(
                f"cdpruner: relevance compares what a CLIP tower made of each patch, but {facts.refusal}: leave relevance out."
            )
        check_width(self.name, self.relevance, facts.width)
        return super().plan(facts)

    def variant(self, facts: Facts) -> str:
        return "embedding" if self.relevance is None else type(self.relevance).__name__

    def needs_at(self, stage: Stage) -> frozenset[str]:
        return self.needs if self.relevance is None else frozenset({"features", "tower_features", "text_ids", "text_valid"})

    def select(self, see: View, keep: int) -> Tensor:
        if self.relevance is None:
            words = normalize(see.text_features.float(), dim=-1)  # zero where padded
            likeness = normalize(see.features.float(), dim=-1) @ words.transpose(1, 2)
            relevance = likeness.sum(dim=-1) / see.text_valid.sum(dim=-1, keepdim=True)
        else:
            relevance = self.relevance(see.tower_features, see.text_ids, see.text_valid).float()
        return determinant_order(see.features, scaled(relevance), keep).sort(dim=-1).values


def scaled(relevance: Tensor) -> Tensor:
    """`[image, visual]` on [10⁻⁶, 1], each picture for itself; 1 where all are equal."""
    low, high = relevance.amin(dim=-1, keepdim=True), relevance.amax(dim=-1, keepdim=True)
    span = high - low
    return torch.where(span > 0, (relevance - low + 1e-6) / span.masked_fill(span == 0, 1), 1.0)


class ClipRelevance:
    """The paper's relevance, from the CLIP model whose vision tower the VLM uses.

    Args:
        clip: a loaded `CLIPModel`; its post-norm and both projections are used, its vision tower is not run again.
        clip_tokenizer: its tokenizer. Questions are cut into pieces of at most its `model_max_length` (77) tokens.
        tokenizer: the VLM's tokenizer, to read the words behind the picture.
    """

    def __init__(self, clip: Any, clip_tokenizer: Any, tokenizer: Any) -> None:
        self.clip, self.clip_tokenizer, self.tokenizer = clip, clip_tokenizer, tokenizer

    @torch.no_grad()
    def __call__(self, tower_features: Tensor, text_ids: Tensor, text_valid: Tensor) -> Tensor:
        patches = self.clip.visual_projection(self.clip.vision_model.post_layernorm(tower_features.to(self.clip.dtype)))
        patches = normalize(patches.float(), dim=-1)
        scores = [
            -(image @ self._embed(ids[valid]).T).mean(dim=-1)
            for image, ids, valid in zip(patches, text_ids, text_valid, strict=True)
        ]
        return torch.stack(scores)

    def _embed(self, ids: Tensor) -> Tensor:
        """`[piece, dim]` unit embeddings of a question."""
        words = self.tokenizer.decode(ids, skip_special_tokens=True)
        inner = self.clip_tokenizer(words, add_special_tokens=False)["input_ids"]
        room = self.clip_tokenizer.model_max_length - 2  # its first and last token
        texts = [self.clip_tokenizer.decode(inner[i : i + room]) for i in range(0, max(len(inner), 1), room)]
        batch = self.clip_tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.clip.device)
        found = self.clip.get_text_features(**batch)
        return normalize(getattr(found, "pooler_output", found).float(), dim=-1)
