"""What a pruning method may see: a closed list of read-only probes.

All probes have the picture as their first axis: `image` counts pictures of equal size, from any sample of the batch, so a
method neither loops over samples nor sees padding. `visual` counts the tokens of a picture that are still there, `text` those
of the prompt behind its last picture (longest of the group; `text_valid` is False where a shorter one is padded).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

PROBES: dict[str, str] = {
    "features": "[image, visual, dim] hidden states entering the layer of the cut (layer 0: the projector's output)",
    "text_features": "[image, text, dim] the same of the text; zero where padded",
    "text_valid": "[image, text] bool, False where a shorter text is padded",
    "text_ids": "[image, text] token ids of the text",
    "normed_features": "[image, visual, dim] `features` behind the language model's final norm",
    "normed_text_features": "[image, text, dim] the same of the text",
    "embeddings": "[image, original, dim] what entered the language model for all tokens of the picture, dropped ones too "
    "(NaN if dropped inside the tower or hidden by the call's mask)",
    "text_embeddings": "[image, text, dim] the same of the text; zero where padded",
    "attention_from_last": "[image, head, visual] fp32 attention of the last prompt token, in the layer before the cut",
    "attention_of_layer": "[image, head, visual] the same, as the layer of the cut itself would pay it to what enters it",
    "attention_from_text": "[image, head, text, visual] fp32 attention of the text after the prompt's last picture, in the "
    "layer before the cut; zero on rows that pad a shorter text",
    "attention_among_text": "[image, head, text, text] fp32 attention of the same rows to each other; zero where padded",
    "query_of_last": "[image, head, dim] query of the last prompt token in the layer before the cut, after rotary embedding as "
    "if the sample began at position 0, whatever padding or packing stands before it",
    "value_of_last": "[image, kv_head, dim] its value",
    "keys": "[image, kv_head, visual, dim] keys of the layer before the cut, after rotary embedding in the same way",
    "values": "[image, kv_head, visual, dim] its values",
    "text_keys": "[image, kv_head, text, dim] the same keys of the text",
    "attention_from_cls": "[image, head, visual] fp32 attention of the vision tower's CLS token, in the block whose output "
    "feeds the projector",
    "attention_from_cls_first": "[image, head, visual] fp32 attention of the vision tower's CLS token, in its first block",
    "attention_from_cls_early": "[image, head, visual] the same, a quarter into the tower (block 5 of 24)",
    "attention_from_cls_final": "[image, head, visual] the same, in the tower's last block",
    "tower_keys": "[image, visual, dim] fp32 keys of the tower's block that feeds the projector, mean over heads",
    "tower_features": "[image, visual, dim] what enters the projector",
    "project": "the model's projector, from `tower_features` to `features`",
    "flow": "[image, visual] fp32 FlowCut score accumulated over the tower's blocks that see the whole picture, one per token",
    "cell": "[image, visual] raster index of each token in its view, which has `side` rows and columns",
    "rotary": "[image, visual, 2, dim] cosines and sines of the tokens' rotary positions in the layer of the cut",
    "text_rotary": "[image, text, 2, dim] the same of the text",
    "identity": "one whole number per picture, equal for equal prompts whatever the batch: a seed for random choices",
}

TEXT_ROWS = frozenset({"attention_from_text", "attention_among_text"})
PROJECTIONS = frozenset({"query_of_last", "value_of_last", "keys", "values", "text_keys"})
BEFORE_THE_CUT = TEXT_ROWS | PROJECTIONS | {"attention_from_last"}
"""Probes that look into the attention of the layer before a cut."""

FROM_TOWER = frozenset(
    {
        "attention_from_cls",
        "attention_from_cls_early",
        "attention_from_cls_first",
        "attention_from_cls_final",
        "tower_keys",
        "tower_features",
        "flow",
        "cell",
    }
)
"""Probes that are taken in the vision tower."""

WITH_CLS = FROM_TOWER - {"flow"}
"""Those that are taken only where it has a CLS token."""


@dataclass(frozen=True)
class TowerFacts:
    """What a method may know about a model before it runs.

    Attributes:
        cls: the vision tower has a CLS token whose attention can be used.
        crops: a picture may be cut into several views (LLaVA-NeXT).
        unit: patches that the tower merges into one visual token (Qwen-VL: 4).
        windows: blocks of the tower look at windows of the picture only (Qwen2.5-VL).
        width: numbers of a patch in the tower, or 0 where it is not known.
        refusal: why there is no usable CLS token.
    """

    cls: bool = False
    crops: bool = False
    unit: int = 1
    windows: bool = False
    width: int = 0
    refusal: str = "its vision tower has no CLS token"


@dataclass(frozen=True, eq=False)
class View:
    """One cut as a method sees it.

    Attributes:
        layer: decoder layer of the cut.
        original: tokens the picture had before any pruning.
        position: `[image, visual]` index of each remaining token inside its picture, 0 … original − 1, rising.
        entered: tokens of the picture that entered the language model: fewer than `original` if the tower dropped some.
        side: rows, and columns, of a picture's view where `cell` is available.
        over_picture: `[image, visual]` what `Pruner.over_picture` made of whole pictures, where each `image` here is one view
            of a picture (LLaVA-NeXT); None where it is the picture itself.
    """

    layer: int
    original: int
    position: Tensor
    probes: dict[str, Any] = field(repr=False)
    entered: int = 0
    side: int = 0
    over_picture: Tensor | None = None

    @property
    def images(self) -> int:
        """Number of pictures."""
        return self.position.shape[0]

    @property
    def visual(self) -> int:
        """Tokens of each picture that are still there."""
        return self.position.shape[1]

    def __getattr__(self, name: str) -> Any:
        if name not in PROBES:
            raise AttributeError(f"a view has no {name!r}; probes: {', '.join(PROBES)}.")
        if name not in self.probes:
            raise AttributeError(f"the method looks at {name!r} but does not declare it: add it to its `needs`.")
        return self.probes[name]
