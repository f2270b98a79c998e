"""FLOPs and KV-cache bytes of a prefill, and averages of visual tokens over decoder layers.

FLOPs of one decoder layer that n tokens enter; a multiplication and an addition count as one each. n includes padding that is
computed. The causal half of the attention matrix is not subtracted.

    projections  2·n·d·(H·Dh + 2·Hkv·Dh) + 2·n·H·Dh·d
    attention    4·n²·H·Dh, or 4·n·m·H·Dh with m keys if the cache was not empty
    MLP          6·n·d·f          (gate, up and down)

Where layers differ (linear attention, windows, shared keys, experts), the sizes are those of each layer:

    projections, MLP     2·n·w, w the weights that a token is multiplied by; of experts, of as many as it is sent to
    attention            4·n·m·H·Dh, with all m keys that are computed, inside the layer's window or not; 0 for recurrent layers
    bytes                of the keys and values that a layer stores: at most window − 1 tokens, none if it sees another layer's

The state of recurrent layers has a fixed size, and what a token costs there beside its weights is small: neither is counted.

With multi-head attention the first formulas are twice the formula 4nd² + 2n²d + 3ndf in the released code of SparseVLM and
AdaptInfer, and equal the numbers in FlowCut's tables. Embeddings and output head are not counted. The bytes are those of the
keys and values in the cache.

A vision tower is counted by itself, with the projector behind it, by the same formulas: each patch, and each token before the
patches, is multiplied by the weights of a block, and attends to those of its own segment (a picture, a crop, or a window).

    patch embedding      2·N·w            all N patches, also those that are dropped behind it
    a block              Σ (2·n·w + 4·n²·H·Dh)     over segments of n patches
    projector            2·t·w            t visual tokens

Papers name budgets by one of two averages over decoder layers:

    compute average   visual tokens that enter a layer: what is really multiplied
    nominal average   visual tokens that leave a layer (SparseVLM, MustDrop, AdaptInfer)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one decoder layer.

    Attributes:
        weights: w, weights that a token is multiplied by.
        query: H·Dh, width of all its query heads; 0 without attention.
        stored: numbers that it stores per token.
        window: tokens that it sees, or None.
    """

    weights: int
    query: int = 0
    stored: int = 0
    window: int | None = None

    def flops(self, tokens: int, keys: int) -> int:
        """FLOPs for one sample, where `tokens` enter the layer and attend to `keys`."""
        return 2 * tokens * self.weights + 4 * tokens * keys * self.query

    def entries(self, tokens: int) -> int:
        """Tokens whose keys and values it still stores after `tokens` came."""
        kept = tokens if self.stored else 0
        return kept if self.window is None else min(kept, self.window - 1)


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
        by_layer: the sizes of every layer, where they differ; empty where the sizes above are those of all layers.
    """

    layers: int
    dim: int
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    mlp: int = 0
    by_layer: tuple[LayerShape, ...] = ()

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

    def flops(self, tokens: Sequence[int], keys: Sequence[int]) -> int:
        """FLOPs of all layers and one sample; `tokens` enter each layer, and attend to `keys`."""
        if not self.by_layer:
            return sum(map(self.layer_flops, tokens, keys))
        return sum(layer.flops(n, m) for layer, n, m in zip(self.by_layer, tokens, keys, strict=True))

    def keys(self, past: int, tokens: int) -> list[int]:
        """Of each layer, to how many keys `tokens` tokens attend that follow `past` others, of which some left its window."""
        if not self.by_layer:
            return [past + tokens] * self.layers
        return [(past if layer.window is None else min(past, layer.window - 1)) + tokens for layer in self.by_layer]

    def entries(self, keys: Sequence[int]) -> list[int]:
        """Of each layer, how many of the `keys` that it attends to it stores."""
        return [layer.entries(n) for layer, n in zip(self.by_layer, keys, strict=True)] if self.by_layer else list(keys)

    def kv_bytes(self, entries: Sequence[int], itemsize: int) -> int:
        """Bytes that all layers store for one sample."""
        if not self.by_layer:
            return sum(self.layer_kv_bytes(keys, itemsize) for keys in entries)
        return sum(layer.stored * keys for layer, keys in zip(self.by_layer, entries, strict=True)) * itemsize


@dataclass(frozen=True)
class TowerShape:
    """The sizes of a vision tower, and of the projector behind it.

    Attributes:
        embedding: weights that a patch is multiplied by before the first block.
        blocks: its blocks, in their order.
        projector: weights that a visual token is multiplied by behind the blocks, or where it leaves them early (DeepStack).
        before: tokens before the patches of a crop.
        patches_per_token: patches that become one visual token.
    """

    embedding: int
    blocks: tuple[LayerShape, ...]
    projector: int
    before: int = 0
    patches_per_token: int = 1

    def flops(self, patches: int, segments: Sequence[Sequence[int]], tokens: int | None = None) -> int:
        """FLOPs of a pass.

        Args:
            patches: patches that are embedded.
            segments: per block, the lengths of what attends to itself, tokens before the patches included.
            tokens: visual tokens that leave the tower; those of the last block if not given.
        """
        blocks = sum(block.flops(n, n) for block, lengths in zip(self.blocks, segments, strict=True) for n in lengths)
        if tokens is None:
            tokens = sum(n - self.before for n in segments[-1]) // self.patches_per_token
        return 2 * patches * self.embedding + blocks + 2 * tokens * self.projector


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
