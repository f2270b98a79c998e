"""FLOPs and KV bytes of a prefill, by one documented formula.

Per decoder layer with n tokens entering it (all tokens, padding that is computed included), a multiply and an add each one
FLOP, causal halving not counted:

    projections  2·n·d·(H·Dh + 2·Hkv·Dh) + 2·n·H·Dh·d
    attention    4·n²·H·Dh        (more exactly 4·n·m·H·Dh with m keys, when a cache was there before)
    MLP          6·n·d·f          (gate, up and down)

With multi-head attention this is twice the formula 4nd² + 2n²d + 3ndf of the SparseVLM and AdaptInfer code, and equals the
convention of FlowCut's tables. Embeddings, vision tower and output head are not counted. KV bytes are those stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """Widths of the language model: d, H, Hkv, Dh, f and the number of layers."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    @staticmethod
    def of(text_config: Any) -> DecoderShape:
        heads = text_config.num_attention_heads
        return DecoderShape(
            layers=text_config.num_hidden_layers,
            dim=text_config.hidden_size,
            heads=heads,
            kv_heads=getattr(text_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
            mlp=text_config.intermediate_size,
        )

    def layer_flops(self, tokens: int, keys: int) -> int:
        """One layer, one sample: `tokens` enter it and attend to `keys`."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = 2 * tokens * self.dim * (heads + 2 * kv) + 2 * tokens * heads * self.dim
        return projections + 4 * tokens * keys * heads + 6 * tokens * self.dim * self.mlp

    def layer_kv_bytes(self, keys: int, itemsize: int) -> int:
        """One layer, one sample: keys and values of `keys` stored tokens."""
        return 2 * keys * self.kv_heads * self.head_dim * itemsize
