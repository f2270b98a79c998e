"""Samples that are packed into one row, set apart: the same call as a batch of one sample per row, padded on the left.

Attention redistribution derives what a row sees from its place and from padding. Where a row holds several samples, it gets
this batch, and what it computes is put back. Samples without a picture have nothing to redistribute, and are left out.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from vlmprune.device import on_device, on_host
from vlmprune.live.call import Call, Prompt
from vlmprune.live.layout import Layout, Tokens
from vlmprune.live.rows import Reduction
from vlmprune.live.section import Section

Numbers = np.ndarray[Any, Any]


@dataclass(eq=False)
class Apart:
    """The samples with a picture of a packed call.

    Attributes:
        call: the same forward pass, as these samples see it.
        batch_rows: `[sample]` the row of the packed call that each is in.
        full: places of each in its row, on the host.
        index: `[sample, token]` where what the current layer computes of each stands; `valid` is False on left padding.
        of: the reduction that `index` is made for.
        layers: the same in each decoder layer, as it was in the layer's first run.
    """

    call: Call
    batch_rows: Tensor
    full: list[Numbers]
    index: Tensor
    valid: Tensor
    of: Reduction | None = None
    layers: dict[int, Apart] = field(default_factory=dict)

    @staticmethod
    def of_packed(call: Call) -> Apart:
        """Set the samples of a packed call apart, before anything is dropped."""
        assert call.prompt is not None
        tokens, layout = call.prompt.tokens, call.prompt.layout
        device = layout.real.device
        samples = sorted({(image.sample, image.segment) for image in layout.images})
        full = [(tokens.segment(row) == segment).nonzero()[0] for row, segment in samples]
        index, valid = _padded(full)
        rows = np.array([row for row, _ in samples])
        alone = Tokens.of(
            np.where(valid, tokens.ids[rows[:, None], index], 0),
            valid & tokens.real[rows[:, None], index],
            valid & tokens.placeholders[rows[:, None], index],
        )
        images = []
        for image in layout.images:
            sample = samples.index((image.sample, image.segment))
            places = np.searchsorted(full[sample], image.places) + index.shape[1] - len(full[sample])
            images.append(replace(image, sample=sample, places=places, places_on_device=on_device(places, device), segment=0))
        real = on_device(alone.real, device)
        mine = Layout(tuple(images), real, tuple(alone.real.sum(axis=1).tolist()))
        return Apart(
            Call(
                owner=call.owner,
                plan=call.plan,
                prompt=Prompt(alone, mine, on_device(alone.end, device)),
                mask=real,
                batch=len(samples),
                sequence=index.shape[1],
                record=call.record,
            ),
            on_device(rows, device),
            full,
            on_device(index, device),
            on_device(valid, device),
        )

    def now(self, call: Call) -> Call:
        """What the samples see in the layer that the packed call is in."""
        mine, section = self.call, call.section
        assert mine.prompt is not None
        assert call.prompt is not None
        mine.prompt.tower, mine.prompt.crops = call.prompt.tower, call.prompt.crops
        mine.recomputes |= call.recomputes
        rows = mine.section.rows
        if section.rows is not self.of:
            assert section.rows is not None
            self.of, device = section.rows, self.index.device
            computed_rows, there = on_host(self.of.rows), on_host(self.of.valid)
            computed, places = [], []
            for row, full in zip(on_host(self.batch_rows), self.full, strict=True):
                here = (there[row] & np.isin(computed_rows[row], full)).nonzero()[0]
                computed.append(here)
                places.append(np.searchsorted(full, computed_rows[row][here]) + mine.sequence - len(full))
            index, valid = _padded(computed)
            self.index, self.valid = on_device(index, device), on_device(valid, device)
            rows = Reduction(on_device(_padded(places)[0], device), self.valid, bool(valid.all()))
        if mine.section.start != section.start or mine.section.rows is not rows:
            mine.section = Section(section.start, section.remaining, rows=rows)
        mine.section.remaining = section.remaining
        return mine

    def in_layer(self, index: int, call: Call) -> Apart:
        """These samples in one layer; gradient checkpointing, which runs a layer again, finds what its first run found."""
        if index not in self.layers:
            self.now(call)
            self.layers[index] = copy(self)
        return self.layers[index]

    def take(self, x: Tensor, token: int) -> Tensor:
        """`[sample, …, token, …]` of `[batch, …, token, …]`, whose axis `token` counts what the layer computes."""
        chosen, index = x[self.batch_rows.to(x.device)], self.index.to(x.device)
        shape = [len(index), *[1] * (token - 1), -1, *[1] * (x.ndim - token - 1)]
        size = [*chosen.shape]
        size[token] = index.shape[1]
        return chosen.gather(token, index.view(shape).expand(size))

    def put_back(self, x: Tensor, computed: Tensor) -> Tensor:
        """`[batch, token, …]` with what was computed of the samples, `[sample, token, …]`, in their places."""
        valid = self.valid.to(x.device)
        rows = self.batch_rows.to(x.device)[:, None].expand_as(valid)[valid]
        return x.index_put((rows, self.index.to(x.device)[valid]), computed[valid])


def _padded(rows: list[Numbers]) -> tuple[Numbers, Numbers]:
    """`[row, longest]` of whole numbers, padded with 0 on the left, and what is no padding."""
    longest = max(map(len, rows))
    filled = np.zeros((len(rows), longest), dtype=int)
    there = np.zeros_like(filled, dtype=bool)
    for number, row in enumerate(rows):
        filled[number, longest - len(row) :], there[number, longest - len(row) :] = row, True
    return filled, there
