"""What probes are taken from: some pictures of equal size, at one stage of a running call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device
from vlmprune.live.call import Call, Projections, Prompt
from vlmprune.live.layout import Image
from vlmprune.live.prompt_rows import in_shortened, own_text, text_after_pictures


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens that are decided together: a picture or a video, one crop of a picture, or one frame of a video.

    Attributes:
        image: number of the picture or video in the call.
        index: `[visual]` tokens of the picture that are left.
        original: tokens before any pruning.
        entered: tokens that entered the language model.
        keep: tokens to keep.
        frames: frames of a video that is decided as a whole; 0 otherwise.
        frame: number of the frame that is decided by itself, or None.
    """

    image: int
    index: Tensor
    original: int
    entered: int
    keep: int
    frames: int = 0
    frame: int | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """Parts of one size are decided in one batch; a video is not decided with a picture."""
        return self.original, self.entered, len(self.index), self.keep, self.frames, self.frame is not None


@dataclass(frozen=True, eq=False)
class Tools:
    """Pieces of the model that probes are made with.

    Attributes:
        ahead: returns `attention_ahead` of this stage.
        norm: the language model's final norm.
        rotary: returns cosines and sines of the rows that enter the layer of the stage, `[batch or 1, token, dim]` each.
        project: the projector.
        start: returns cosines and sines of the first token of each sample, `[batch, segment, head_dim]` each; None if unknown.
    """

    ahead: Callable[[], Tensor]
    norm: Callable[[Tensor], Tensor]
    rotary: Callable[[], tuple[Tensor, Tensor]]
    project: Callable[[Tensor], Tensor] | None
    start: Callable[[], tuple[Tensor, Tensor] | None]


class Source:
    """What the probes of some pictures of equal size are taken from, at one stage.

    Args:
        call: the running forward pass.
        layer: decoder layer of the stage.
        group: the pictures, or crops of them.
        hidden: `[batch, token, dim]` entering the layer.
        tools: pieces of the model.

    Attributes:
        images: the picture of each part.
        position: `[image, visual]` indices of the tokens in their pictures.
        samples, segments: `[image]` the batch row of each picture, and which of the samples packed into that row.
        visual: `[image, visual]` the pictures' tokens, as rows of `hidden`.
    """

    def __init__(self, call: Call, layer: int, group: Sequence[Part], hidden: Tensor, tools: Tools) -> None:
        assert call.prompt is not None
        self._call, self._prompt, self._layer = call, call.prompt, layer
        self.group, self.hidden, self.tools = group, hidden, tools
        self.images, index, rows, visual = [], [], [], []
        for part in group:
            image = self._prompt.layout.images[part.image]
            self.images.append(image)
            index.append(part.index)
            rows.append((image.sample, image.segment))
            visual.append(image.places_on_device[part.index])
        self.position, places = torch.stack(index), torch.stack(visual)
        self.samples, self.segments = on_device(np.array(rows).T, self.position.device)
        shortened = call.section.rows
        self.visual = places if shortened is None else shortened.places(self.samples, places)

    # -- where the text is ------------------------------------------------------------------------------------------------

    @cached_property
    def _text_places(self) -> Tensor:
        """`[batch, text]` places of the text after the pictures, in the prompt."""
        return text_after_pictures(self._call).rows

    @cached_property
    def _text_rows(self) -> Tensor:
        """`[batch, text]` the same as rows of `hidden`."""
        return in_shortened(self._call, self._text_places)

    @cached_property
    def _own_text(self) -> tuple[Tensor | None, Tensor]:
        return own_text(self._call, self.images)

    # -- frames of videos ---------------------------------------------------------------------------------------------------

    @property
    def frames(self) -> int:
        """Frames of each video; 1 of a picture, and of a frame that is decided by itself."""
        return max(self.group[0].frames, 1)

    @cached_property
    def frame(self) -> Tensor:
        """`[image, visual]` the frame that each token shows, among those that are decided together."""
        if not self.group[0].frames:
            return torch.zeros_like(self.position)
        of_token = on_device(np.array([image.frame for image in self.images]), self.position.device)  # alike: one group
        return of_token.gather(1, self.position)

    @property
    def times(self) -> Tensor:
        """`[image, frame]` seconds at which each frame is shown; NaN where unknown."""
        rows = [
            image.times[part.frame : part.frame + 1] if part.frame is not None else image.times or (math.nan,)
            for image, part in zip(self.images, self.group, strict=True)
        ]
        return on_device(np.array(rows, dtype=np.float32), self.position.device)

    @property
    def text_valid(self) -> Tensor:
        """`[image, text]` bool, False on padding of shorter texts."""
        return self._own_text[1]

    def _of_sample(self, text: Tensor) -> Tensor:
        """`[image, text]` of `[batch, text]`: the text of each picture's own sample."""
        order, text = self._own_text[0], text[self.samples.to(text.device)]
        return text if order is None else text.gather(1, order.to(text.device))

    # -- parts of what the model computed ------------------------------------------------------------------------------------

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows `[image, …, row, dim]` of `[batch, …, token, dim]`, `index` `[image, row]`."""
        chosen, index = x[self.samples.to(x.device)], index.to(x.device)
        between = [1] * (x.ndim - 3)
        return chosen.gather(-2, index.view(len(index), *between, -1, 1).expand(*chosen.shape[:-2], -1, x.shape[-1]))

    def text(self, x: Tensor, whole: bool = False) -> Tensor:
        """`[image, …, text, dim]` of `[batch, …, token, dim]`; zero where padded. `whole`: `x` has the prompt's full length."""
        valid = self.text_valid.to(x.device)
        chosen = self.rows(x, self._of_sample(self._text_places if whole else self._text_rows))
        return chosen.masked_fill(~valid.view(len(valid), *[1] * (x.ndim - 3), -1, 1), 0)

    def of_last(self, attention: Tensor) -> Tensor:
        """`[image, head, visual]` of the last prompt tokens' `[batch, head, segment, key]`."""
        own = attention[self.samples.to(attention.device), :, self.segments.to(attention.device)]
        return columns(own, self.visual)

    def unrotated(self, x: Tensor) -> Tensor:
        """Queries or keys `[image, head, …, dim]` as they would be if their sample began at position 0."""
        if (start := self.tools.start()) is None:
            return x
        cos, sin = (part[self.samples, self.segments.to(part.device)].to(x.device) for part in start)  # [image, dim]
        return unrotated(x, cos, sin)

    # -- of the call -------------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> Tensor:
        """`[batch, sequence]` token ids of the prompt."""
        return on_device(self._prompt.tokens.ids, self.position.device)

    @property
    def embeddings(self) -> Tensor:
        """`[batch, sequence, dim]` what entered the language model; NaN for visual tokens that the call's mask hides."""
        embeddings, masked = self._prompt.embeddings, self._prompt.tokens.masked
        assert embeddings is not None
        return (
            embeddings.masked_fill(on_device(masked, embeddings.device)[..., None], torch.nan) if masked.any() else embeddings
        )

    @property
    def attention_of_last(self) -> Tensor:
        """`[batch, head, segment, key]` attention of the last prompt token, in the layer before."""
        return self._prompt.attention[self._layer - 1]

    @property
    def attention_of_text(self) -> Tensor:
        """`[image, head, text, key]` attention of the text, in the layer before; zero where padded."""
        attention = self._prompt.text_attention[self._layer - 1]
        order, valid = self._own_text
        attention = attention[self.samples.to(attention.device)]
        if order is not None:
            index = order.to(attention.device)[:, None, :, None]
            attention = attention.gather(2, index.expand(-1, attention.shape[1], -1, attention.shape[3]))
        return attention.masked_fill(~valid.to(attention.device)[:, None, :, None], 0)

    @property
    def projections(self) -> Projections:
        """Queries, keys and values of the layer before."""
        return self._prompt.projections[self._layer - 1]

    @property
    def rotary(self) -> Tensor:
        """`[batch, token, 2 × dim]` cosines, then sines, of what enters the layer."""
        return torch.cat(self.tools.rotary(), dim=-1).expand(self.hidden.shape[0], -1, -1)

    def of_tower(self, name: str) -> Tensor:
        """`[image, visual, …]` a probe that was taken inside the vision tower."""
        tower, device = self._prompt.tower, self.hidden.device
        return torch.stack([tower[part.image][name][part.index.to(device)] for part in self.group])

    def identities(self) -> tuple[int, ...]:
        """One number per picture, or per frame that is decided by itself."""
        return tuple(identity_of(self._prompt, image, part.frame) for image, part in zip(self.images, self.group, strict=True))

    @property
    def side(self) -> int:
        """Rows, and columns, of a crop; 0 if no method needs it, or the tower has none."""
        crops = self._prompt.crops
        return int(crops[self.group[0].image][:, 1].max()) if crops else 0

    def of_text(self) -> Tensor:
        """`[image, text]` the text, as rows of `hidden`."""
        return self._of_sample(self._text_rows)


def columns(attention: Tensor, index: Tensor) -> Tensor:
    """Columns `[image, …, column]` of `[image, …, key]`, `index` `[image, column]`."""
    index = index.to(attention.device)
    between = [1] * (attention.ndim - 2)
    return attention.gather(-1, index.view(len(index), *between, -1).expand(*attention.shape[:-1], -1))


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `[image, head, …, dim]` back by a rotary embedding `[image, rotary dim]`, whose own factor is taken out; exact where
    it is that of position 0. Numbers that turn together have equal sines: they are half the width apart, or neighbours."""
    shape = (len(cos), *[1] * (x.ndim - 2), -1)
    cos, sin = cos.float().view(shape), sin.float().view(shape)
    size = torch.hypot(cos, sin)
    cos, sin = cos / size, sin / size
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.float().chunk(2, dim=-1)
    even, odd = turning.float().unflatten(-1, (-1, 2)).unbind(dim=-1)
    halves = torch.cat((-second, first), dim=-1)
    neighbours = torch.stack((-odd, even), dim=-1).flatten(-2)
    left, right = sin.chunk(2, dim=-1)
    turned = torch.where((left == right).all(), halves, neighbours)
    back = turning.float() * cos - turned * sin
    return torch.cat((back.to(x.dtype), rest), dim=-1)


def identity_of(prompt: Prompt, image: Image, frame: int | None = None) -> int:
    """Equal for equal prompts, whatever the batch, the padding, the row they are packed into, or candidates of assisted
    decoding; `frame` if one frame is decided by itself."""
    mine = prompt.tokens.own[image.sample] & (prompt.tokens.segment(image.sample) == image.segment)
    ids = prompt.tokens.ids[image.sample][mine]
    beside = [other for other in prompt.layout.images if (other.sample, other.segment) == (image.sample, image.segment)]
    ordinal = beside.index(image)
    name = f"{ordinal}" if frame is None else f"{ordinal}.{frame}"
    return int.from_bytes(blake2b(f"{name}/{ids.tolist()}".encode(), digest_size=8).digest(), "little")
