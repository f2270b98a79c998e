"""An image tower that stands alone, without a language model, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vlmprune.view import TowerFacts


@dataclass(frozen=True)
class Pool:
    """Attention that makes one token, or a few, of all patches, behind the last block.

    Attributes:
        path: of the module, from the tower.
        hides: its keyword argument that hides tokens: "key_padding_mask" (True hides) or "attn_mask" (added to the scores).
    """

    path: str
    hides: str


@dataclass(frozen=True)
class ImageTower:
    """The image tower of one model, as built.

    Attributes:
        name: what it is, in a sentence: "an image tower of open_clip (VisionTransformer)".
        root: path of the module that takes pixels and returns features, from the model; "" if it is the model.
        blocks: path of the list of blocks, from the tower. Each takes `[picture, token, dim]` first, and attends with
            `scaled_dot_product_attention` or `nn.MultiheadAttention`.
        before: how many tokens are before the patches.
        cls: whether the only one of them is a CLS token.
        grid: rows and columns of patches.
        width: numbers of a token.
        queries: numbers of a token's queries, over all heads.
        image: height and width of the pictures that it takes; None if they may differ.
        patch: height and width of a patch; None where patches overlap, or are made by more than one convolution.
        averaged: path of the module whose output is averaged over patches, or may be, from the tower.
        pools: attention behind the blocks that looks at patches.
        averages_before: the tokens before the patches are averaged with them.
        rotary: the blocks' keyword argument with rotary embeddings of patches, or None.
    """

    name: str
    root: str
    blocks: str
    before: int
    cls: bool
    grid: tuple[int, int]
    width: int
    queries: int
    image: tuple[int, int] | None
    patch: tuple[int, int] | None
    averaged: str
    averages_before: bool = False
    pools: tuple[Pool, ...] = ()
    rotary: str | None = None

    @property
    def facts(self) -> TowerFacts:
        """Traits that methods may ask for."""
        found = f"it has {self.before} tokens before its patches" if self.before else "it has no CLS token"
        return TowerFacts(cls=self.cls, width=self.width, refusal=found)


def patch_of(convolution: object) -> tuple[int, int] | None:
    """Height and width of the patches that a module makes of pixels; None where they overlap, or it is no convolution."""
    if not isinstance(convolution, nn.Conv2d):
        return None
    size, stride = convolution.kernel_size, convolution.stride
    apart = size == stride and convolution.padding in ((0, 0), "valid") and convolution.dilation == (1, 1)
    return (size[0], size[1]) if apart else None
