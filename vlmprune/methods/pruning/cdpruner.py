"""CDPruner. Zhang et al., NeurIPS 2025, arXiv:2506.10967. Diversity, conditioned on the question: a determinantal point
process.

    S = argmax_{|S|=K} det L_S, greedily;   L_ij = r_i · cos(x_i, x_j) · r_j
    r = relevance, scaled to [10⁻⁶, 1] over all tokens of a picture

With a CLIP model (`relevance=ClipRelevance(…)`, or its name in a recipe, `relevance=open_clip:ViT-L-14-336/openai`), relevance
is the paper's: minus the mean cosine of the patch's and the question's CLIP embeddings. Without one, it is the mean cosine of
the token and the embeddings of the words after the picture, as in ports to models without CLIP (`embedding` variant; inferred,
not the paper's).

Each crop of a LLaVA-NeXT picture is chosen from separately, as in the code, but r is scaled over all crops together. Differs
from the official code: scaling per picture (official: over all pictures of the batch); equal relevance everywhere is 1
(official: division by zero); K is the picture's, shared among its crops by their tokens (official: K of each crop); padding is
no candidate, because pictures are un-padded first (official: never); row separators stay unless newlines="drop" (official:
none); positions are kept; fp32 from the features on (official: features are normalised in the model's dtype).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.errors import UsageError
from vlmprune.kernels.select_diverse import determinant_order
from vlmprune.methods.base import Pruner
from vlmprune.methods.checks import check_numbers
from vlmprune.methods.relevance import check_relevance, check_width, named_relevance
from vlmprune.schedule import Schedule, Stage, at
from vlmprune.view import TowerFacts, View

Relevance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From `tower_features` `[image, visual, dim]`, `text_ids` `[image, text]` and `text_valid` to `[image, visual]`; of whole
pictures, all crops of a LLaVA-NeXT picture together."""


@dataclass(frozen=True, kw_only=True)
class CDPruner(Pruner):
    """Keep diverse tokens, the relevant ones first.

    Args:
        relevance: scores patches by the question: a function `relevance(tower_features, text_ids, text_valid)`, for example
            `ClipRelevance`; or a CLIP model by its name, "open_clip:NAME/PRETRAINED" or "clip:FOLDER" (a hub id or folder of
            transformers), which is loaded when a model is wrapped. Token and word embeddings are compared if None.
    """

    name = "cdpruner"
    paper = "arXiv:2506.10967 (NeurIPS 2025)"
    note = "relevance from the model's own embeddings unless a CLIP model is given; K of a picture, not of each crop"
    needs = frozenset({"features", "text_features", "text_valid"})
    official_positions = "compact"
    default = at(layer=0, tokens=64)
    chooses = "picks tokens one after the other, each the most relevant one that is unlike those before"
    per_crop = True
    scales_over_picture = True

    relevance: Relevance | str | None = None

    def validate(self) -> None:
        if self.relevance is not None:
            check_relevance(self.name, self.relevance)

    def plan(self, facts: TowerFacts) -> Schedule:
        if self.relevance is not None and not facts.cls:
            raise UsageError(
                f"cdpruner: relevance compares what a CLIP tower made of each patch, but {facts.refusal}: leave relevance out."
            )
        check_width(self.name, self.relevance, facts.width)
        return super().plan(facts)

    def bind(self, facts: TowerFacts, name: str, device: Any) -> Pruner:
        if not isinstance(self.relevance, str):
            return self
        self.plan(facts)  # refuses before anything is loaded
        return replace(self, relevance=named_relevance(self.relevance, name, device))

    def variant(self, facts: TowerFacts) -> str:
        if self.relevance is None:
            return "embedding"
        return self.relevance if isinstance(self.relevance, str) else type(self.relevance).__name__

    def needs_at(self, stage: Stage) -> frozenset[str]:
        return self.needs if self.relevance is None else frozenset({"features", "tower_features", "text_ids", "text_valid"})

    def over_picture(self, see: View) -> Tensor:
        if self.relevance is not None:
            assert not isinstance(self.relevance, str), "a relevance that is named is loaded when a model is wrapped"
            relevance = self.relevance(see.tower_features, see.text_ids, see.text_valid)
            check_numbers("cdpruner: relevance", relevance, (see.images, see.visual), infinite=False)
            return scaled(relevance.float())
        words = normalize(see.text_features.float(), dim=-1)  # zero where padded
        likeness = normalize(see.features.float(), dim=-1) @ words.transpose(1, 2)
        return scaled(likeness.sum(dim=-1) / see.text_valid.sum(dim=-1, keepdim=True))

    def select(self, see: View, keep: int) -> Tensor:
        return self.order(see, keep).sort(dim=-1).values

    def order(self, see: View, keep: int) -> Tensor:
        relevance = self.over_picture(see) if see.over_picture is None else see.over_picture
        return determinant_order(see.features, relevance, keep)


def scaled(relevance: Tensor) -> Tensor:
    """`[image, visual]` on [10⁻⁶ / span, 1 + 10⁻⁶ / span], each picture separately; span is its highest minus its lowest; 1 if
    all are equal."""
    low, high = relevance.amin(dim=-1, keepdim=True), relevance.amax(dim=-1, keepdim=True)
    span = high - low
    return torch.where(span > 0, (relevance - low + 1e-6) / span.masked_fill(span == 0, 1), 1.0)
