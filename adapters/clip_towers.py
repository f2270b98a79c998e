"""Image towers of transformers that stand alone: CLIP, and SigLIP (SigLIP 2 too, where its pictures have one size)."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.adapters.image_tower import ImageTower, Pool, patch_of
from vlmprune.errors import UsageError

CLIP_TYPES = ("clip", "clip_vision_model")
SIGLIP_TYPES = ("siglip", "siglip_vision_model")
VARIED = ("siglip2", "siglip2_vision_model")


def tower_in(model: nn.Module) -> ImageTower | None:
    """The image tower in a CLIP or SigLIP model of transformers, or in a part of one that takes pixels; None for others.

    Raises:
        UsageError: pictures have sizes of their own, and are padded (`Siglip2Model`).
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in (*CLIP_TYPES, *SIGLIP_TYPES, *VARIED):
        return None
    root = next((name for name, part in model.named_modules() if _takes_pixels(part)), None)
    if root is None:  # a text model
        return None
    if kind in VARIED:
        raise UsageError(
            f"{type(model).__name__} pads pictures of different sizes to one length (NaFlex), which is not supported: wrap a "
            "SigLIP 2 of one size, which transformers loads as SiglipModel."
        )
    return _of(model.get_submodule(root), root, kind in CLIP_TYPES, f"the image tower of {type(model).__name__}")


def _takes_pixels(part: Any) -> bool:
    embeds = isinstance(getattr(getattr(part, "embeddings", None), "patch_embedding", None), nn.Module)
    return embeds and hasattr(getattr(part, "encoder", None), "layers")


def _of(tower: Any, root: str, cls: bool, name: str) -> ImageTower:
    config, embedding = tower.config, tower.embeddings.patch_embedding
    side, last = config.image_size // config.patch_size, config.num_hidden_layers - 1
    head = hasattr(getattr(tower, "head", None), "attention")
    return ImageTower(
        name=name,
        root=root,
        blocks="encoder.layers",
        before=int(cls),
        cls=cls,
        grid=(side, side),
        width=config.hidden_size,
        queries=config.hidden_size,
        image=(config.image_size, config.image_size),
        patch=patch_of(embedding),
        averaged=f"encoder.layers.{last}" if cls else "post_layernorm",
        pools=(Pool("head.attention", "key_padding_mask"),) if head else (),
    )
