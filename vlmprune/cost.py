"""FLOPs and KV-cache bytes of a prefill, and averages of visual tokens over decoder layers.

FLOPs of one decoder layer that n tokens enter; a multiplication and an addition count as one each. n includes padding that is
computed. The causal half of the attention matrix is not subtracted.

    projections  2·n·d·(H·Dh + 2·Hkv·Dh) + 2·n·H·Dh·d
    attention    4·n²·H·Dh, or 4·n·m·H·Dh with m keys if the cache was not empty
    MLP          6·n·d·f          (gate, up and down)

With multi-head attention this is twice the formula 4nd² + 2n²d + 3ndf in the released code of SparseVLM and AdaptInfer, and
equals the numbers in FlowCut's tables. Embeddings, vision tower and output head are not counted. The bytes are those of the
keys and values in the cache.

Papers name budgets by one of two averages over decoder layers:

    compute average   visual tokens that enter a layer: what is really multiplied
    nominal average   visual tokens that leave a layer (SparseVLM, MustDrop, AdaptInfer)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a language model; symbols as in the formulas above.

    Attributes:
        layers: number of decoder layers.
        dim: d, width of the hidden states.
        heads: H, query heads.
        kv_heads: Hkv, key and value heads.
        head_dim: Dh, width of a head.
        mlp: f, width inside the MLP.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    @staticmethod
    def of(text_config: Any) -> DecoderShape:
        """The sizes in the config of a language model."""
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
        """FLOPs of one layer and one sample, where `tokens` enter the layer and attend to `keys`."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = 2 * tokens * self.dim * (heads + 2 * kv) + 2 * tokens * heads * self.dim
        return projections + 4 * tokens * keys * heads + 6 * tokens * self.dim * self.mlp

    def layer_kv_bytes(self, keys: int, itemsize: int) -> int:
        """Bytes that one layer stores for one sample: keys and values of `keys` tokens, in numbers of `itemsize` bytes."""
        return 2 * keys * self.kv_heads * self.head_dim * itemsize


def compute_average(visual: float, layers: int, kept: Mapping[int, float]) -> float:
    """Visual tokens that enter a decoder layer, mean over layers.

    Args:
        visual: tokens that enter the first layer, unless a stage is at layer 0.
        layers: decoder layers of the model.
        kept: tokens kept, by the first layer that computes only them.
    """
    borders = [0, *sorted(kept), layers]
    counts = [visual, *(kept[layer] for layer in sorted(kept))]
    return sum(count * (end - start) for count, (start, end) in zip(counts, pairwise(borders), strict=True)) / layers


def nominal_average(visual: float, layers: int, kept: Mapping[int, float]) -> float:
    """Visual tokens that leave a decoder layer, mean over layers; arguments as in `compute_average`."""
    # A stage at layer i shortens the output of layer i − 1. Of several stages that move to layer 0, the last one decides.
    return compute_average(visual, layers, {max(layer - 1, 0): kept[layer] for layer in sorted(kept)})
