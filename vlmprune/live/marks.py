"""What attention redistribution found out about a conversation, kept on its cache layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmprune.device import on_device


@dataclass(eq=False)
class Marks:
    """What a redistribution method found out about a conversation's prompts, in one decoder layer.

    Attributes:
        by: the method, as its recipe string.
        codes: `[batch, 1 or head, marked]` int8 group of each of the first `marked` stored entries, 0 for ordinary ones; all
            later entries (decoding) are ordinary. None if the method marks no entries.
        heads: `[batch, head]` fp32 factor on the outputs of heads, or None.
        anchor: `[batch, dim]` fp32 residual of the conversation's first token, where a method compares with it, or None.
        groups: `codes` as 0 or 1 for each group, made by `grouped` and kept for decoding.
        present: `[batch, 1 or head, 1, 1 + groups]` bool, which groups have an entry, made with it.
        weight: `[batch, marked]` what scores are raised by, made by `weighted` from `groups`, or None.
        idle: no entry is marked, which is known on the host.
    """

    by: str
    codes: Tensor | None = None
    heads: Tensor | None = None
    anchor: Tensor | None = None
    groups: Tensor | None = None
    present: Tensor | None = None
    weight: Tensor | None = None
    idle: bool = False

    def grouped(self, groups: int, dtype: torch.dtype) -> Tensor:
        """`[batch, 1 or head, marked, 1 + groups]` of `dtype`, 0 or 1: which group each entry is in."""
        assert self.codes is not None
        if self.groups is None or self.groups.dtype != dtype:
            numbers = torch.arange(groups + 1, device=self.codes.device)
            member = self.codes[..., None] == numbers
            self.groups, self.present = member.to(dtype), member.any(dim=2, keepdim=True)
            self.weight = None
        return self.groups

    def weighted(self, strengths: Sequence[float], dtype: torch.dtype) -> Tensor:
        """`[batch, marked]` of `dtype`: the strength of the group that each entry is in, and 0 for ordinary ones."""
        groups = self.grouped(len(strengths), dtype)
        if self.weight is None:
            self.weight = groups[:, 0] @ on_device(np.array((0.0, *strengths)), groups.device).to(dtype)
        return self.weight

    def padded(self, stored: int) -> Tensor:
        """The codes of exactly `stored` entries."""
        assert self.codes is not None
        return torch.nn.functional.pad(self.codes, (0, stored - self.codes.shape[-1]))

    def batch(self, indices: Tensor) -> None:
        """Take other batch rows (beams, contrastive search)."""
        for name in ("codes", "heads", "anchor"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x[indices.to(x.device)])
        self.groups = None

    def repeat(self, repeats: int) -> None:
        """Repeat every batch row."""
        for name in ("codes", "heads", "anchor"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x.repeat_interleave(repeats, dim=0))
        self.groups = None

    def entries(self, rows: Tensor | None, stored: int) -> None:
        """Only `stored` entries are left: those at `rows` `[batch, stored]`, or the first."""
        if self.codes is None:
            return
        if rows is None:
            self.codes = self.codes[..., :stored]
        else:
            heads = self.codes.shape[1]
            self.codes = self.codes.gather(2, rows.to(self.codes.device)[:, None].expand(-1, heads, -1))
        self.groups = None
