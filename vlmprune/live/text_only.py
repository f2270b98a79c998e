"""The text-only stream: the prompt without its images, run through the decoder layers beside the prompt.

A method that scales heads compares their outputs with and without the image. Both streams go through a layer one after the
other, the text-only one first as soon as the layer's attention is reached, and both are scaled, so that the next layer compares
scaled streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.adapters.family import Family, has_mrope
from vlmprune.device import on_device
from vlmprune.errors import UsageError
from vlmprune.live.attention import CALL_ARGUMENT
from vlmprune.live.call import Call
from vlmprune.live.edits import Edits
from vlmprune.live.masks import pruned_mask
from vlmprune.live.prompt_rows import prompt_end
from vlmprune.live.rows import Reduction
from vlmprune.methods.redistributing import HeadScaler


@dataclass(eq=False)
class TextOnly:
    """The state of the text-only stream.

    Attributes:
        hidden: `[batch, text, dim]` what enters its next layer.
        kwargs: arguments of the decoder layers.
        layers: the decoder layers that it runs through.
        pictured: `[batch]` bool, samples that have an image.
        done: number of layers that it has run through.
        with_image: `[batch, head, dim]` fp32 outputs of the current layer's heads for the full prompt, at its last token; None
            while no method compares.
        scale: `[batch, head]` factors of the heads, found in the current layer.
    """

    hidden: Tensor
    kwargs: dict[str, Any]
    layers: Sequence[Any]
    pictured: Tensor
    done: int = 0
    with_image: Tensor | None = None
    scale: Tensor | None = None

    @staticmethod
    def enter(
        call: Call, embeddings: Tensor, language_model: Any, family: Family, layers: Sequence[Any], name: str
    ) -> TextOnly:
        """Begin the stream of a prompt with images.

        Args:
            call: the prompt's call.
            embeddings: `[batch, token, dim]` what enters the language model.
            language_model, family: the language model, and where its parts are.
            layers: the decoder layers up to the last one that is compared.
            name: of the method, for a refusal.

        Raises:
            UsageError: a prompt has an image and no text.
        """
        words = Reduction.keeping(*_words(call, name))
        hidden = words.gather(embeddings)
        slots = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)
        valid = words.valid.to(hidden.device)
        mask = pruned_mask(slots, valid, slots, valid, words.dense, language_model.config._attn_implementation, hidden.dtype)
        positions = (valid.cumsum(dim=1) - 1).clamp_min(0)
        positions = positions.expand(3, -1, -1) if has_mrope(language_model.config) else positions
        own = Call(owner=call.owner, plan=call.plan, edits=Edits(is_text_only=True))
        kwargs = {
            "attention_mask": mask,
            "position_ids": None,
            "position_embeddings": language_model.get_submodule(family.rotary)(hidden, positions),
            "past_key_values": None,
            "use_cache": False,
            CALL_ARGUMENT: own,
        }
        assert call.prompt is not None
        pictured = on_device(np.asarray(call.prompt.tokens.visual.any(axis=1)), hidden.device)
        own.edits.text_only = stream = TextOnly(hidden, kwargs, layers, pictured)
        return stream

    def advance(self, index: int) -> None:
        """Run through layer `index`, if the stream goes so far and has not run through it (gradient checkpointing)."""
        if not self.done <= index < len(self.layers):
            return
        self.done = index + 1
        with torch.no_grad():
            # `forward`, not a call of the module: the layer's hooks belong to the prompt, and would run twice.
            output = self.layers[index].forward(self.hidden, **self.kwargs)
        self.hidden = output[0] if isinstance(output, tuple) else output
        self.with_image = None

    def attend(self, method: object, result: Any) -> Any:
        """The stream's own attention in a layer: `result` as it is, or its heads compared and scaled."""
        output: Tensor = result[0]
        if not isinstance(method, HeadScaler) or self.with_image is None:
            return output, None
        scale = method.scale(self.with_image, output[:, -1].float())
        self.scale = torch.where(self.pictured[:, None], scale, 1)
        return scaled(output, self.scale), None

    def compare(self, index: int, call: Call, output: Tensor) -> Tensor | None:
        """`[batch, head]` factors for the prompt in layer `index`, whose heads have the output `[batch, token, head, dim]`."""
        end = prompt_end(call, output.shape[1]).to(output.device)
        self.with_image = output.detach()[torch.arange(len(end), device=end.device), end].float()
        self.advance(index)
        return self.scale

    def close(self) -> None:
        """Release the stream's call, which refers to the stream."""
        self.kwargs.clear()


def scaled(output: Tensor, heads: Tensor) -> Tensor:
    """`[batch, token, head, dim]` with the factors `[batch, head]`."""
    return output * heads.to(output)[:, None, :, None]


def _words(call: Call, name: str) -> tuple[Tensor, list[int]]:
    """`[batch, token]` bool, the prompt's text, and how many tokens that is in each row."""
    assert call.prompt is not None
    tokens = call.prompt.tokens
    text = tokens.own & ~tokens.visual
    if (lone := tokens.visual.any(axis=1) & ~text.any(axis=1)).any():
        row = int(lone.argmax())
        hides = " that the mask does not hide" if (~tokens.real & ~tokens.placeholders)[row].any() else ""
        raise UsageError(
            f"{name} compares with the prompt without its picture, but a prompt is only a picture: row {row} has no "
            f"text{hides}; add a question."
        )
    # A row that is completely hidden has neither text nor image. It gets one token, which scales nothing.
    return on_device(text, call.prompt.layout.real.device), np.maximum(text.sum(axis=1), 1).tolist()
