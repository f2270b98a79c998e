"""flow_score: the interpreted kernel within the rule of rule.py of its reference."""

from __future__ import annotations

import pytest
import torch
from kernels.rule import among_nan, assert_within_rule, of_dots

from vlmprune.errors import UsageError
from vlmprune.kernels.flow_score import cost, flow_score, reference

SHAPES = {  # views, heads, kv_heads, tokens, dim
    "one token": (1, 2, 2, 1, 64),
    "17 tokens, 7 to a key head": (2, 7, 1, 17, 72),
    "129 tokens, 2 to a key head": (1, 4, 2, 129, 80),
    "3 heads of 128": (2, 3, 3, 40, 128),
    "tiny heads": (1, 4, 4, 7, 5),
    "wide heads": (1, 2, 1, 18, 256),
}
LARGEST = 24.0
"""No score below is larger."""


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, padded: bool) -> list[object]:
    """All arguments, each tensor in the middle of NaN."""
    views, heads, kv_heads, tokens, dim = shape
    query, anchor = drawn(views, heads, dim, dtype=dtype, seed=1), drawn(views, kv_heads, dim, dtype=dtype, seed=2)
    key, value = (drawn(views, kv_heads, tokens, dim, dtype=dtype, seed=seed) for seed in (3, 4))
    valid = None
    if padded:
        valid = drawn(views, tokens, seed=5) > 0
        valid[0] = torch.arange(tokens) == tokens // 2  # all but one is padding
        valid[-1, -1] = True
        valid = among_nan(valid)
    return [*map(among_nan, (query, 2 * key, value, anchor)), dim**-0.5, 0.2, valid]


def on_triton(*arguments: object) -> tuple[torch.Tensor, ...]:
    return flow_score(*arguments, impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_odd_shapes(dtype, padded, shape):
    assert_within_rule(on_triton, reference.flow_score, *inputs(shape, dtype, padded), roundings=of_dots(shape[-1], LARGEST))


def test_strides():
    """Heads transposed as models do it, the global token a slice, an expanded view and mask, a strided last axis."""
    x, y = drawn(2, 21, 2, 16, seed=1).transpose(1, 2), drawn(2, 2, 16, 21, seed=2).transpose(2, 3)
    valid = (drawn(1, 21, seed=3) > 0).expand(2, -1)
    for key, value in ((x, y), (y, x), (x[:1].expand(2, -1, -1, -1), x)):
        assert_within_rule(
            on_triton,
            reference.flow_score,
            key[:, :, 0],
            key,
            value,
            value[:, :, 0],
            0.3,
            0.2,
            valid,
            roundings=of_dots(16, 16),
        )


def test_any_size_of_block(monkeypatch):
    """How many tokens a program takes, and how many blocks the second pass reads at a time, changes nothing."""
    from vlmprune.kernels.flow_score import kernel

    arguments = inputs((1, 3, 3, 150, 16), torch.float32, padded=True)
    arguments[-1][:, :40] = False
    plain, small = kernel.options, kernel.softmax_options
    for tokens, blocks, later in ((16, 2, 16), (64, 1, 64), (32, 16, 16)):
        monkeypatch.setattr(kernel, "options", lambda *given, tokens=tokens: plain(*given) | {"TOKENS": tokens})
        monkeypatch.setattr(
            kernel,
            "softmax_options",
            lambda *given, blocks=blocks, later=later: small(*given) | {"BLOCKS": blocks, "TOKENS": later},
        )
        assert_within_rule(on_triton, reference.flow_score, *arguments, roundings=of_dots(16, LARGEST))


def test_padded_keys_may_be_nan():
    arguments = inputs((2, 2, 2, 19, 16), torch.float32, padded=True)
    arguments[6][:, 3] = False
    arguments[1][:, :, 3] = torch.nan
    relation, semantic, magnitude = on_triton(*arguments)
    for found in (relation, semantic, magnitude):
        assert not found.isnan().any()
    assert not relation[:, 3].any()
    assert not semantic[:, 3].any()


def test_a_view_of_padding_is_uniform_as_in_the_reference():
    arguments = inputs((2, 2, 2, 19, 16), torch.float32, padded=True)
    arguments[6][1] = False
    assert_within_rule(on_triton, reference.flow_score, *arguments, roundings=of_dots(16, LARGEST))


def test_nothing_to_do():
    x = torch.randn(2, 2, 0, 16)
    assert [y.shape for y in on_triton(torch.randn(2, 2, 16), x, x, torch.randn(2, 2, 16), 1.0, 1.0)] == [(2, 0)] * 3


def test_offsets_pass_two_to_the_31():
    """Something stands 2³¹ elements behind the start, at a stride that itself fits 32 bits; few pages are ever touched."""
    far = 2**30
    buffer = torch.Tensor(torch.UntypedStorage(2 * (2 * far + 64))).view(torch.bfloat16)
    for strides in ((far, 0, 16, 1), (0, far, 16, 1), (0, 16, far, 1)):
        x = buffer.as_strided((3, 3, 3, 16), strides)
        for place in range(3):
            x[place, place, place] = drawn(16, dtype=torch.bfloat16, seed=place)
        near = x.contiguous()
        results = (
            on_triton(x[:, :, 2], x, x, x[:, :, 1], 0.3, 0.2),
            on_triton(near[:, :, 2], near, near, near[:, :, 1], 0.3, 0.2),
        )
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


def test_autocast_and_gradients():
    """Computed in fp32 under autocast; detached."""
    arguments = inputs((1, 2, 2, 17, 16), torch.float32, padded=False)
    plain = on_triton(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(on_triton(*arguments), plain, strict=True))
    arguments[1].requires_grad_()
    assert not any(x.requires_grad for x in on_triton(*arguments))


def test_bad_input():
    one, x = torch.randn(1, 2, 16), torch.randn(1, 2, 5, 16)
    for impl in ("auto", "reference", "triton"):
        with pytest.raises(UsageError, match=r"flow_score: value must have shape \[1, 2, 5, 16\] here, found \[1, 2, 4, 16\]"):
            flow_score(one, x, x[:, :, :4], one, 1.0, 1.0, impl=impl)
        with pytest.raises(UsageError, match=r"flow_score: anchor must have shape \[1, 2, 16\] here, found \[1, 1, 16\]"):
            flow_score(one, x, x, one[:, :1], 1.0, 1.0, impl=impl)
        with pytest.raises(UsageError, match=r"flow_score: key must have shape \[1, any, any, 16\] here, found \[1, 2, 5, 8\]"):
            flow_score(one, x[..., :8], x[..., :8], one, 1.0, 1.0, impl=impl)
        with pytest.raises(UsageError, match=r"flow_score: query has 2 heads, which the 3 heads of key must divide"):
            flow_score(one, x[:, [0, 1, 1]], x[:, [0, 1, 1]], one[:, [0, 1, 1]], 1.0, 1.0, impl=impl)
        with pytest.raises(UsageError, match=r"^flow_score: value is torch.float16 but key torch.float32: convert one"):
            flow_score(one, x, x.half(), one, 1.0, 1.0, impl=impl)
        with pytest.raises(UsageError, match=r"^flow_score: anchor is torch.float16 but key torch.float32: convert one"):
            flow_score(one, x, x, one.half(), 1.0, 1.0, impl=impl)
        with pytest.raises(UsageError, match=r"flow_score: valid must be torch.bool, found torch.float32"):
            flow_score(one, x, x, one, 1.0, 1.0, torch.ones(1, 5), impl=impl)
    wide = torch.randn(1, 1, 3, 300)
    with pytest.raises(UsageError, match=r"flow_score: key has head size 300 but kernels take 1 to 256"):
        flow_score(wide[:, :, 0], wide, wide, wide[:, :, 0], 1.0, 1.0, impl="triton")
    with pytest.raises(UsageError, match=r"flow_score: query is float64 but kernels compute in fp32"):
        flow_score(*(y.double() for y in (one, x, x, one)), 1.0, 1.0, impl="triton")


def test_cost():
    one, x = torch.randn(2, 4, 16), torch.randn(2, 2, 5, 16)
    found = cost(one, x, x, one[:, :2], 1.0, 1.0)
    assert found.bytes_moved == 4 * (2 * 4 * 16 + 2 * 2 * 2 * 5 * 16 + 2 * 2 * 16) + 3 * 4 * 2 * 5
    assert found.flops == 2 * (4 + 2) * 5 * (2 * 16 + 4) + 2 * 2 * 5 * 16 + 2 * 2 * 5 * 16
