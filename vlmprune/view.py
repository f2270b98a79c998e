"""What a pruning method may see: a closed list of read-only probes.

All probes have the picture as their first axis: `image` counts pictures of equal size, from any sample of the batch, so a
method neither loops over samples nor sees padding. `visual` counts the tokens of a picture that are still there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

PROBES: dict[str, str] = {
    "features": "[image, visual, dim] hidden states entering the layer of the cut (layer 0: the projector's output)",
    "attention_from_last": "[image, head, visual] fp32 attention of the last prompt token, in the layer before the cut",
    "attention_of_layer": "[image, head, visual] the same, as the layer of the cut itself would pay it to what enters it",
    "attention_from_text": "[image, head, text, visual] fp32 attention of the text after the prompt's last picture, in the "
    "layer before the cut; zero on rows that pad a shorter text",
    "attention_among_text": "[image, head, text, text] fp32 attention of the same rows to each other; zero where padded",
    "attention_from_cls": "[image, head, visual] fp32 attention of the vision tower's CLS token, in the block whose output "
    "feeds the projector",
    "identity": "one whole number per picture, equal for equal prompts whatever the batch: a seed for random choices",
}


@dataclass(frozen=True, eq=False)
class View:
    """One cut as a method sees it.

    Attributes:
        layer: decoder layer of the cut.
        original: tokens the picture had before any pruning.
        position: `[image, visual]` index of each remaining token inside its picture, 0 … original − 1, rising.
    """

    layer: int
    original: int
    position: Tensor
    probes: dict[str, Tensor | tuple[int, ...]] = field(repr=False)

    @property
    def images(self) -> int:
        """Number of pictures."""
        return self.position.shape[0]

    @property
    def visual(self) -> int:
        """Tokens of each picture that are still there."""
        return self.position.shape[1]

    @property
    def features(self) -> Tensor:
        return self._probe("features")  # type: ignore[return-value]

    @property
    def attention_from_last(self) -> Tensor:
        return self._probe("attention_from_last")  # type: ignore[return-value]

    @property
    def attention_from_text(self) -> Tensor:
        return self._probe("attention_from_text")  # type: ignore[return-value]

    @property
    def attention_among_text(self) -> Tensor:
        return self._probe("attention_among_text")  # type: ignore[return-value]

    @property
    def attention_of_layer(self) -> Tensor:
        return self._probe("attention_of_layer")  # type: ignore[return-value]

    @property
    def attention_from_cls(self) -> Tensor:
        return self._probe("attention_from_cls")  # type: ignore[return-value]

    @property
    def identity(self) -> tuple[int, ...]:
        return self._probe("identity")  # type: ignore[return-value]

    def _probe(self, name: str) -> Tensor | tuple[int, ...]:
        if name not in self.probes:
            raise AttributeError(f"the method looks at {name!r} but does not declare it: add it to its `needs`.")
        return self.probes[name]


for _name, _meaning in PROBES.items():
    getattr(View, _name).__doc__ = _meaning
