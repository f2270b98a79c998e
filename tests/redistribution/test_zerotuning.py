"""ZeroTuning: a whole model against the loops of its paper, and its formula at the ends of its range."""

from __future__ import annotations

import pytest
import torch
from redistribution.comparing import assert_equals_the_loops
from redistribution.loops.zerotuning import edited
from redistribution.recipes import RECIPES
from tiny_models import implementations_of

import vlmprune as vp
from vlmprune.kernels.grouped_attention import grouped_attention


@pytest.mark.parametrize(("family", "attn"), implementations_of(("llava", "qwen2_5_vl")))
def test_zerotuning_equals_the_loops(family, attn):
    assert_equals_the_loops(RECIPES["zerotuning"], family, attn, edited)


@pytest.mark.parametrize("gain", [0.0, 1e-40, 1e-9, 1e-6, 1e-4, 1e-3, 0.5, 2.0, 1e4])
def test_zerotuning_rows_sum_to_one(gain):
    """Red: the divisor cancels in rows that see little but the first token; the first row sees nothing else."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 8).unbind(0)
    key[:, :, 0] = 6 * query[:, :, 4]  # one row whose weight on the first token rounds to 1
    first = torch.zeros(1, 1, 6, 2)
    first[..., 0], first[0, 0, 0] = 1, torch.tensor([0.0, 1.0])
    position = torch.arange(6)[None]
    out, factors, masses = grouped_attention(
        query, key, value, 1.0, position, None, first, vp.ZeroTuning(gain=gain).coefficients
    )
    sums = (factors * masses).sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, 0], value[:, :, 0], atol=1e-6, rtol=0)
    a = (query.double() @ key.double().transpose(-1, -2)).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    a[..., 1:, 0] *= gain
    expected = (a / a.sum(dim=-1, keepdim=True)) @ value.double()
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), atol=1e-4, rtol=0)
