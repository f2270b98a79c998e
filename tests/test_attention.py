"""Masks of shortened sequences in every form an attention implementation expects."""

from __future__ import annotations

import pytest
import torch
from oracles import Watch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from vlmprune.kernels.attention_mass import attention_mass
from vlmprune.live.attention import rows_attention
from vlmprune.live.masks import BLOCK, block_mask, pruned_mask

SLOTS = torch.tensor([[0, 2, 5, 6], [9, 1, 3, 6]])  # row 1 begins with padding
VALID = torch.tensor([[True, True, True, True], [False, True, True, True]])


def test_dense_sequences_need_no_mask():
    """None lets SDPA and flash attention use their causal kernels; one query sees everything anyway."""
    for implementation in ("sdpa", "flash_attention_2"):
        assert pruned_mask(SLOTS[:1], VALID[:1], SLOTS[:1], VALID[:1], True, implementation, torch.float32) is None
        assert pruned_mask(SLOTS[:1, -1:], VALID[:1, -1:], SLOTS[:1], VALID[:1], True, implementation, torch.float32) is None


def test_bool_mask_is_causal_and_hides_padding():
    mask = pruned_mask(SLOTS, VALID, SLOTS, VALID, False, "sdpa", torch.float32)
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0, 0].tolist() == torch.ones(4, 4).tril().bool().tolist()
    assert mask[1, 0, 1:].tolist() == [[False, True, False, False], [False, True, True, False], [False, True, True, True]]
    assert mask[1, 0, 0, 0], "a padding row must see itself, or it becomes NaN"


def test_additive_mask_says_the_same():
    visible = pruned_mask(SLOTS, VALID, SLOTS, VALID, False, "sdpa", torch.float32)
    additive = pruned_mask(SLOTS, VALID, SLOTS, VALID, False, "eager", torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive == 0, visible)
    assert additive.min() == torch.finfo(torch.bfloat16).min


def test_continuation_sees_the_gapped_prefix():
    """Two new tokens at 7 and 8 on a prefix that kept 0, 2, 5, 6."""
    slots = torch.cat((SLOTS[:1], torch.tensor([[7, 8]])), dim=1)
    valid = torch.ones_like(slots, dtype=torch.bool)
    mask = pruned_mask(slots[:, -2:], valid[:, -2:], slots, valid, True, "sdpa", torch.float32)
    assert mask[0, 0].tolist() == [[True] * 5 + [False], [True] * 6]


def test_flash_takes_padding_as_two_dimensions():
    assert pruned_mask(SLOTS, VALID, SLOTS, VALID, False, "flash_attention_2", torch.float32) is VALID


def test_flex_takes_a_mask_of_blocks():
    """Without a mask flex attention is not causal, so that only one query among dense keys can do without."""
    dense, one = (SLOTS[:1], VALID[:1]), (SLOTS[:1, -1:], VALID[:1, -1:])
    assert pruned_mask(*one, *dense, True, "flex_attention", torch.float32) is None
    mask = pruned_mask(*dense, *dense, True, "flex_attention", torch.float32)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, 4, 4, "cpu"), torch.ones(1, 1, 4, 4).tril().bool())
    mask = pruned_mask(SLOTS, VALID, SLOTS, VALID, False, "flex_attention", torch.float32)
    expected = torch.ones(2, 1, 4, 4).tril().bool() & VALID[:, None, None]
    assert torch.equal(create_mask(mask.mask_mod, 2, 1, 4, 4, "cpu"), expected)
    mask = pruned_mask(SLOTS[:, -1:], VALID[:, -1:], SLOTS, VALID, False, "flex_attention", torch.float32)
    assert torch.equal(create_mask(mask.mask_mod, 2, 1, 1, 4, "cpu"), VALID[:, None, None])


def test_flex_without_padding_works_on_any_device():
    """Red: layers on another device (`device_map`) look up padding where the mask was made; there is none to look up."""
    dense = pruned_mask(SLOTS[:1], VALID[:1], SLOTS[:1], VALID[:1], True, "flex_attention", torch.float32)
    assert create_mask(dense.mask_mod, 1, 1, 4, 4, "meta").shape == (1, 1, 4, 4)
    ragged = pruned_mask(SLOTS, VALID, SLOTS, VALID, False, "flex_attention", torch.float32)
    with pytest.raises(RuntimeError):
        create_mask(ragged.mask_mod, 2, 1, 4, 4, "meta")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 5, 200), (128, 257, 1)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 300), (3, 384), (128, 128), (300, 300), (256, 512), (257, 700)])
def test_blocks_are_those_of_torch(queries, keys, padding, causal):
    """Red: a block of the mask counts as empty or full and is not, or a partial one is skipped."""
    valid = torch.arange(keys) >= torch.tensor(padding).clamp(max=keys)[:, None]
    if padding[0]:
        valid[0, keys // 2 : keys // 2 + 140] = False  # a hole wider than a block
    mine = block_mask(queries, valid, causal=causal)
    past = keys - queries

    def visible(batch, head, query, key):
        return valid[batch, key] & ((key <= query + past) | (not causal))

    torchs = create_block_mask(visible, 3, None, queries, keys, "cpu", BLOCK)
    assert mine.shape == torchs.shape
    assert mine.BLOCK_SIZE == torchs.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "full_q_num_blocks"):
        ours, theirs = getattr(mine, name), getattr(torchs, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    assert torch.equal(create_mask(mine.mask_mod, 3, 1, queries, keys, "cpu"), create_mask(visible, 3, 1, queries, keys, "cpu"))


def test_flex_builds_no_map_of_all_rows():
    """Red: a mask of blocks, or the rows a probe reads in it, pass through queries × keys."""

    n = 4096
    valid = torch.arange(n)[None] >= 100
    query = key = torch.zeros(1, 1, n, 1)
    with Watch() as made:
        rows_attention(query, key, block_mask(n, valid), 1.0, torch.tensor([[n - 1, 7]]))
    assert n <= made.numbers < n * 16
    with Watch() as made:
        create_block_mask(block_mask(n, valid).mask_mod, 1, None, n, n, "cpu")
    assert made.numbers >= n * n, "the test is blind"


@pytest.mark.parametrize("form", ["none", "bool", "additive", "blocks"])
def test_rows_attention_equals_the_full_map(form):
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8)  # grouped heads, two keys from an earlier turn
    visible = torch.ones(5, 7).tril(2).bool().expand(2, 1, 5, 7).clone()
    if form != "none":
        visible[1, :, :, 0] = False
    mask = {
        "none": None,
        "bool": visible,
        "additive": torch.zeros(2, 1, 5, 7).masked_fill(~visible, torch.finfo(torch.float32).min),
        "blocks": create_block_mask(lambda b, h, q, k: visible[b, 0, q, k], 2, None, 5, 7, "cpu"),
    }[form]
    scores = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    full = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    rows = torch.tensor([[4, 0], [2, 3]])
    found = rows_attention(query, key, mask, 0.3, rows)
    assert torch.allclose(found, torch.stack([full[0][:, [4, 0]], full[1][:, [2, 3]]]), atol=1e-6)


def test_attention_mass_sums_rows_in_fp32():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, 4).half(), torch.randn(1, 2, 5, 4).half()
    expected = (query.float() @ key.float().transpose(-1, -2) * 0.5).softmax(-1).sum(2)
    found = attention_mass(query, key, 0.5)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6)
