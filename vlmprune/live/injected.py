"""What a language model adds to its visual tokens between decoder layers (DeepStack), where a stage shortens the sequence.

The model adds the i-th entry after layer i, to all visual tokens of the prompt. It is given the entries of the layers
before the first stage only. The others are added here, before the next layer, to the rows that are still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmprune.adapters.family import Injected
from vlmprune.errors import UsageError
from vlmprune.live.rows import Reduction


@dataclass(frozen=True, eq=False)
class Injections:
    """What is left for us to add in a call.

    Attributes:
        places: `[batch, sequence]` bool, the visual tokens.
        features: after each decoder layer, `[visual, dim]` what is added to them; None where the model adds it.
    """

    places: Tensor
    features: tuple[Tensor | None, ...]

    def entering(self, layer: int, hidden: Tensor, rows: Reduction | None) -> Tensor:
        """What enters a layer, with what is added after the layer before it.

        Args:
            layer: its number.
            hidden: `[batch, row, dim]`.
            rows: the places of these rows; None if all are there.
        """
        added = self.features[layer - 1] if 0 < layer <= len(self.features) else None
        if added is None:
            return hidden
        batch, sequence = self.places.shape
        whole = hidden.new_zeros(batch, sequence, hidden.shape[-1])
        whole = whole.masked_scatter(self.places.to(hidden.device)[..., None], added.to(hidden))
        return hidden + (whole if rows is None else rows.gather(whole))


def take_over(injected: Injected, first: int, layers: int, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Injections | None]:
    """Take from the arguments of a language model what it would add after the first stage.

    Args:
        injected: names of the arguments.
        first: decoder layer of the first stage.
        layers: how many there are.
        kwargs: the arguments.

    Returns:
        The arguments that the model is given, and what is left to add; None if there is nothing.

    Raises:
        UsageError: something would be added after the last layer.
    """
    features: Sequence[Tensor] | None = kwargs.get(injected.features)
    if features is None or len(features) <= first:
        return kwargs, None
    if len(features) >= layers:
        raise UsageError(
            f"the language model adds features of the tower after each of its {layers} layers, also after the last one, where "
            "tokens are not there any more: run this call inside `with run.override(enabled=False):`."
        )
    left = Injections(kwargs[injected.places], (*[None] * first, *features[first:]))
    return {**kwargs, injected.features: list(features[:first])}, left
