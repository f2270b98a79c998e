"""FlowCut. Tong et al., NeurIPS 2025, arXiv:2505.19536, sections 3.1 to 3.3. Attention as a flow to one global token.

    S = (I_a / ΣI_a + I_s / ΣI_s) · I_d     relation q_g·k_j, semantic v_g·v_j, magnitude ‖v_j‖₁ (kernels/flow_score)
    C ← ½ C + ½ S                           over the blocks of the vision tower; the first sets C = S
    r = − Σ p log p / log N                 p: the relation of this block, renormalised
    P = round( (N − T) / √R · (1 − r²) )    patches dropped after every second block; R blocks remain; the last keeps T

With a CLS token (LLaVA-1.5), the CLS token is global, and K patches leave the tower. If pictures are cut into crops
(LLaVA-NeXT), K/2 per crop leave the tower, and the flow to the last prompt token in the second decoder layer keeps K. If the
tower merges patches (Qwen-VL), the mean token is global, 2K tokens reach the language model, and the second layer keeps K. Two
variants find the 2K:

    official   patches are dropped inside the tower by I_a · I_d, and every four consecutive survivors are merged, wherever they
               were; their places are lost (as in the code for Qwen2-VL; not with windows)
    unit       no patch is dropped in the tower: whole 2×2 units are kept by the mean of C over their patches, C from the blocks
               with full attention. Ours, not the paper's; it leaves windows and M-RoPE intact, and also suits towers that need
               every patch up to their end (Qwen3-VL, GLM-V, InternVL).

I_a, I_s and r are normalised over the patches that a crop still has; in the decoder over the picture's tokens, all crops
together. As in the code, each crop keeps ⌊K/2⌋, padding included, and un-padding may then drop survivors: slightly fewer than K
can be left of a picture. Differs from the official code: each crop is decided separately (official: the largest P of the
batch); a zero probability has no entropy (official: NaN); the tower's scores are fp32 (official: its dtype); positions are kept
(the LLaVA code renumbers after the decoder's stage); row separators of LLaVA-NeXT stay unless newlines="drop" (official:
dropped); the decoder's score is normalised for Qwen too. As in the code, heads are averaged before the norm in I_d, and in the
tower the semantic softmax is not scaled (semantic_scale="paper" divides by √d) and includes CLS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlmprune.errors import UsageError
from vlmprune.kernels.flow_score import entropy_ratio, flow_score, share
from vlmprune.methods.base import alive_top, top
from vlmprune.methods.parameters import choice, number
from vlmprune.methods.tower import Block, TowerPruner, TowerState
from vlmprune.schedule import Budget, Schedule, Stage
from vlmprune.view import Probe, TowerFacts, View


@dataclass(frozen=True, kw_only=True)
class FlowCut(TowerPruner):
    """Keep what the flow of attention passes through, from the first block of the vision tower on.

    Args:
        semantic_scale: "code" (no factor in the tower, 1/√d in the decoder and in the unit variant) or "paper" (1/√d
            everywhere).
        variant_on_units: "auto", "official" or "unit" for towers that merge patches; auto is official where no block has
            windows.
        decoder_layer: first decoder layer that sees K tokens only, if there is a decoder stage.
    """

    name = "flowcut"
    paper = "arXiv:2505.19536 (NeurIPS 2025)"
    note = "each crop is decided separately; the `unit` variant (Qwen2.5-VL) is ours"
    needs = frozenset({"query_of_last", "value_of_last", "keys", "values"})
    watches = "attention and values in the tower"
    provides = Probe("flow", "[image, visual]", "C of each token, the mean over its patches", "tower method", fp32=True)
    official_positions = "compact (LLaVA), original (Qwen)"
    chooses = "keeps the highest flow"
    chooses_in_tower = "drops the lowest flow after every second block"
    default = Schedule((Stage(0, Budget(tokens=128), "vision"),))

    semantic_scale: Literal["code", "paper"] = choice("code", "paper")
    variant_on_units: Literal["auto", "official", "unit"] = choice("auto", "official", "unit")
    decoder_layer: int = number(2, low=1, whole=True)

    def validate(self) -> None:
        if any(stage.site == "llm" and stage.layer == 0 for stage in self.stages):
            raise UsageError("flowcut cannot prune before layer 1: it looks at the layer before its stage, found layer=0.")
        if any(stage.site == "vision" and not (stage.budget.tokens or stage.budget.fraction) for stage in self.stages):
            raise UsageError("flowcut cannot drop every patch inside the vision tower: keep at least tokens=1.")

    def variant(self, facts: TowerFacts) -> str:
        if all(stage.site == "llm" for stage in self.stages):
            return "decoder only"
        if facts.cls and not facts.whole:
            return "per crop" if facts.crops else ""
        whole = facts.windows or facts.whole
        return ("unit" if whole else "official") if self.variant_on_units == "auto" else self.variant_on_units

    def plan(self, facts: TowerFacts) -> Schedule:
        first = self.stages[0]
        if first.site != "vision":
            return Schedule(self.stages)
        if not facts.cls and facts.patches_per_token == 1:
            raise UsageError(f"flowcut needs a CLS token or merge units in the vision tower, but {facts.refusal}.")
        if self.variant(facts) == "official" and (facts.windows or facts.whole):
            broken = "breaks the windows of this vision tower" if facts.windows else "drops patches that this tower needs"
            raise UsageError(f'flowcut: variant_on_units="official" {broken}: use "unit".')
        if len(self.stages) > 1 and self.variant(facts) == "unit":
            raise UsageError("flowcut: its unit variant has no stage inside the tower: give tokens or fraction, without sites.")
        if len(self.stages) > 1 or (facts.cls and not facts.crops):
            return Schedule(self.stages)
        # K/2 in each of at most 5 crops of one picture; a fraction is of all of them.
        wider = first.budget.scaled(0.5, 2.5) if self.variant(facts) == "per crop" else first.budget.scaled(2.0, 2.0)
        in_tower = replace(first, budget=wider, site="llm" if self.variant(facts) == "unit" else "vision")
        return Schedule((in_tower, Stage(self.decoder_layer, first.budget)))

    def needs_at(self, stage: Stage) -> frozenset[str]:
        return frozenset({self.provides.name}) if stage.layer == 0 else self.needs

    # -- in the tower ----------------------------------------------------------------------------------------------------

    def watch(self, block: Block, state: TowerState) -> None:
        dim = block.query.shape[-1]
        query = block.query[:, :, 0] if block.cls else block.query.mean(dim=2)
        anchor = block.value[:, :, 0] if block.cls else block.value.mean(dim=2)
        semantic_scaling = 1.0 if self.semantic_scale == "code" and block.cls else dim**-0.5
        terms = flow_score(query, block.key, block.value, anchor, block.scaling, semantic_scaling, block.valid)
        relation, semantic, magnitude = (term[:, 1:] if block.cls else term for term in terms)
        if self.variant(state.facts) == "official":
            flow = relation * magnitude
        else:
            flow = (share(relation) + share(semantic)) * magnitude
        past = state.carried.get("flow")
        state.carried |= {"flow": flow if past is None else 0.5 * past + 0.5 * flow, "relation": relation}

    def drop(self, index: int, last: int, hidden: Tensor, state: TowerState) -> tuple[Tensor, Tensor] | None:
        remaining, patches = last - index - 1, hidden.shape[1]
        if remaining < 0 or remaining % 2 or patches <= state.target:
            return None
        present = torch.full(hidden.shape[:1], patches, device=hidden.device) if state.valid is None else state.valid.sum(dim=1)
        dropped = present
        if remaining:
            ratio = entropy_ratio(state.carried["relation"], present)
            dropped = ((present - state.target) / math.sqrt(remaining) * (1 - ratio.double() ** 2)).round().long()
        return alive_top(state.carried["flow"], (present - dropped).clamp_min(state.target), state.valid), hidden

    # -- before and in the decoder ---------------------------------------------------------------------------------------

    def select(self, see: View, keep: int) -> Tensor:
        return top(self.scores(see), keep)

    def scores(self, see: View) -> Tensor:
        if see.layer == 0:
            return see.flow
        scale = see.query_of_last.shape[-1] ** -0.5
        relation, semantic, magnitude = flow_score(see.query_of_last, see.keys, see.values, see.value_of_last, scale, scale)
        return (share(relation) + share(semantic)) * magnitude
