"""The decision, applied many times: which positions of a sequence go on. The only gather and scatter of the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.device import on_host
from vlmprune.kernels.gather_tokens import gather_all, gather_tokens


@dataclass(frozen=True, eq=False)
class Reduction:
    """Positions of a call's sequence that are still computed.

    Rows are left-padded: the last real token of every sample stays at index −1, where generation reads it. Padding of the
    prompt is dropped with the pruned tokens, so that a ragged batch really becomes shorter.

    Attributes:
        rows: `[batch, kept]` positions in the call's sequence, rising within a sample.
        valid: `[batch, kept]` bool, False on the left padding of samples that keep fewer tokens.
        dense: True when every entry is valid (known on the host, so that masks can be left out).
    """

    rows: Tensor
    valid: Tensor
    dense: bool

    @staticmethod
    def keeping(alive: Tensor, counts: Sequence[int] | None = None) -> Reduction:
        """Keep the True positions of `alive` `[batch, sequence]`.

        Args:
            alive: bool.
            counts: how many there are in each row. Without them they are counted, which waits for the device.
        """
        counts = on_host(alive.sum(dim=1)).tolist() if counts is None else counts
        fewest, most = min(counts), max(counts)
        # A stable sort puts the dead first and leaves the living in order, at the right end.
        rows = alive.to(torch.int8).argsort(dim=1, stable=True)[:, alive.shape[1] - most :]
        return Reduction(rows, alive.gather(1, rows), fewest == most)

    def places(self, samples: Tensor, positions: Tensor) -> Tensor:
        """Where positions of the call's sequence stand in the shortened one.

        Args:
            samples: `[n]` batch rows.
            positions: `[n, visual]` positions, all of them kept.
        """
        samples = samples.to(self.rows.device)
        # Left padding holds dropped positions in no useful order; below every real one, each row is sorted.
        rising = self.rows[samples].masked_fill(~self.valid[samples], -1)
        return torch.searchsorted(rising, positions.to(rising.device).contiguous())

    def after(self, earlier: Reduction | None) -> Reduction:
        """The same decision, addressed in the sequence that `earlier` already shortened."""
        if earlier is None:
            return self
        samples = torch.arange(self.rows.shape[0], device=self.rows.device)
        rows = earlier.places(samples, self.rows).clamp_(max=earlier.rows.shape[1] - 1)  # left padding may point anywhere
        return Reduction(rows, self.valid, self.dense)

    def gather(self, x: Tensor) -> Tensor:
        """`[batch or 1, …, sequence, dim]` -> `[batch, …, kept, dim]`; left padding is zero, never a dropped token (a NaN there
        would poison masked attention)."""
        return gather_tokens(x, self.rows.to(x.device), None if self.dense else self.valid.to(x.device))

    def gather_all(self, *tensors: Tensor) -> list[Tensor]:
        """`gather` of several tensors, in one launch where they are on one device."""
        if len({x.device for x in tensors}) > 1:
            return [self.gather(x) for x in tensors]
        device = tensors[0].device
        return gather_all(tensors, self.rows.to(device), None if self.dense else self.valid.to(device))

    def scatter(self, x: Tensor, sequence: int) -> Tensor:
        """`[batch, kept, dim]` -> `[batch, sequence, dim]`, zero where nothing was kept."""
        rows, valid = self.rows.to(x.device), self.valid.to(x.device)
        full = x.new_zeros(x.shape[0], sequence + 1, x.shape[-1])
        # Left padding goes to an extra column that is cut off again, so that it overwrites nothing.
        target = torch.where(valid, rows, sequence)[..., None].expand_as(x)
        return full.scatter(1, target, x)[:, :sequence]
