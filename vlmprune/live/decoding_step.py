"""The edit of a decoding step: one row that sees every key, with tables that are made once per prompt."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmprune.kernels.grouped_attention import Coefficients, checked_grouped, checked_scored
from vlmprune.live.marks import Marks
from vlmprune.methods.redistributing import GroupEditor, Redistributor, ScoreEditor


@dataclass(frozen=True, eq=False)
class DecodingStep:
    """What is the same in all decoding steps after a prompt, in one layer. It runs for every token, and so does as little as
    possible; it needs no gradients, and no padding among the keys.

    Attributes:
        op: computes the edited attention; its checks have passed.
        table: `[batch, entry]` weights of scores, or `[batch, 1 or head, entry, 1 + groups]` membership, if `coefficients`.
        coefficients: factors from the groups' masses, or None if scores are raised.
        dtype: of queries, keys and values.
        entries: the longest conversation that the table is enough for.
    """

    op: Callable[..., Any]
    table: Tensor
    coefficients: Coefficients | None
    dtype: torch.dtype
    entries: float

    @staticmethod
    def of(method: Redistributor, marks: Marks, query: Tensor, key: Tensor, value: Tensor) -> DecodingStep:
        """Make the tables, and the op's checks, for these and later steps.

        Raises:
            UsageError: the op cannot run.
        """
        dtype, keys = torch.promote_types(query.dtype, torch.float32), key.shape[2]
        if isinstance(method, ScoreEditor):
            weight = marks.weights(method.strengths, keys, dtype)
            op: Callable[..., Any] = checked_scored(query, key, value, None, None, weight)
            table, coefficients = marks.weight, None
        else:
            assert isinstance(method, GroupEditor)
            members = marks.members(method.group_count, keys, dtype)
            op = checked_grouped(query, key, value, None, None, members)
            table, coefficients = marks.membership, partial(method.coefficients, present=marks.present)
        assert table is not None
        entries = table.shape[1 if coefficients is None else 2]
        return DecodingStep(op, table, coefficients, query.dtype, entries if key.device.type == "cpu" else math.inf)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """`[batch, 1, head, dim]` in the model's dtype."""
        if self.coefficients is None:
            edited: Tensor = self.op(query, key, value, scaling, None, None, self.table[:, : key.shape[2]])
        else:
            table = self.table[:, :, : key.shape[2]]
            edited = self.op(query, key, value, scaling, None, None, table, self.coefficients)[0]
        return edited if edited.dtype == self.dtype else edited.to(self.dtype)
