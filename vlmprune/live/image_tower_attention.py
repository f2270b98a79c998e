"""Attention in a block of an image tower: seen, and masked, where the block computes it.

Blocks of open_clip and timm know nothing of transformers' registry of attention functions. While a block runs, a mode of
torch's own (`torch.overrides.TorchFunctionMode`) is called instead of two functions that blocks attend with. It belongs to the
thread, and nothing is replaced. Queries, keys and values are those that the block has computed anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Seen = Callable[[Tensor, Tensor, Tensor, float], None]
"""Called with queries, keys and values `[picture, head, token, dim]`, and the factor on scores."""


class BlockAttention(TorchFunctionMode):
    """The attention of one block, while it runs.

    Args:
        see: is shown it, or None.
        visible: `[picture, token]` bool, False on padding; None if there is none.

    Attributes:
        count: how often the block has attended in a way that is known.
    """

    def __init__(self, see: Seen | None, visible: Tensor | None) -> None:
        super().__init__()
        self._see, self._mask, self.count = see, None if visible is None else visible[:, None, None], 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward and _plain(*args, **kwargs):
            return self._project(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if attn_mask is None:
            self.count += 1
            if self._see is not None:
                scale = kwargs.get("scale")
                self._see(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
            attn_mask = self._mask
        return functional.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)

    def _project(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor,
        in_proj_bias: Tensor | None,
        bias_k: None,
        bias_v: None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What `nn.MultiheadAttention` does, of `[token, picture, dim]`, as far as `_plain` admits it."""
        projected = functional.linear(query.transpose(0, 1), in_proj_weight, in_proj_bias)
        heads = projected.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, picture, head, token, dim]
        attended = self._attend(*heads.unbind(0), dropout_p=dropout_p if training else 0.0)
        out = functional.linear(attended.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
        return out.transpose(0, 1), None


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    *args: Any,
    **kwargs: Any,
) -> bool:
    """Whether `nn.MultiheadAttention` looks at its own tokens, all of them, and is asked for no weights."""
    own = query is key and key is value and query.ndim == 3 and in_proj_weight is not None
    more = add_zero_attn or kwargs.get("need_weights", True) or kwargs.get("use_separate_proj_weight", False)
    masks = ("key_padding_mask", "attn_mask", "static_k", "static_v")
    return own and not more and bias_k is None and bias_v is None and all(kwargs.get(name) is None for name in masks)
