"""What attention redistribution carries through one call, from hook to hook."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmprune.live.cache_layer import Marked
from vlmprune.live.rows import Reduction

if TYPE_CHECKING:
    from vlmprune.live.apart import Apart
    from vlmprune.live.text_only import TextOnly


@dataclass(eq=False)
class LayerInput:
    """What an edited layer is given, and what its first run finds. Gradient checkpointing runs the layer again.

    Attributes:
        index: of the layer.
        call: the call as this layer sees it.
        hidden: `[batch, token, dim]` residual that enters the layer; None once the layer's marks exist.
        layer: the cache layer that keeps the marks; without a cache, an empty one that stays with the prompt.
        valid: `[batch, key]` bool, False on padding; None if there is none.
        rows: the rows that are edited; None for all.
        ran: the layer has run once, so that `valid` and `rows` are found.
    """

    index: int
    call: Any
    hidden: Tensor | None
    layer: Marked
    valid: Tensor | None = None
    rows: Reduction | None = None
    ran: bool = False


@dataclass(eq=False)
class Edits:
    """What redistribution carries from hook to hook.

    Attributes:
        inputs: per edited layer, what it is given and what it finds. Kept until the call ends, so that gradient checkpointing,
            which runs layers again in the backward pass, finds what the first run found.
        rows: the rows that are edited, per kind of rows, number of tokens that a layer computes, and start of its section.
        valid: per number of keys, which of them are real, where the call's own mask says it.
        marked_layers: in a decoding step of one token that sees all keys, the cache layer with the marks, per edited layer.
        ready: every edited layer is in `inputs` or in `marked_layers`: the layers' hooks have nothing to prepare.
        text_only: the stream that runs the prompt without its images, if a method compares with it.
        is_text_only: True in the call of that stream.
        apart: the samples that are packed into rows, each in a row of its own; None if they are not packed.
    """

    inputs: dict[int, LayerInput] = field(default_factory=dict)
    rows: dict[tuple[str, int, int], Reduction | None] = field(default_factory=dict)
    valid: dict[int, Tensor | None] = field(default_factory=dict)
    marked_layers: dict[int, Marked] = field(default_factory=dict)
    ready: bool = False
    text_only: TextOnly | None = None
    is_text_only: bool = False
    apart: Apart | None = None
