"""Image towers of open_clip (3.3): its own ViT, and the ViTs of timm that it builds on. Nothing of either package is imported:
a model that was loaded says by its classes where it comes from."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn

from vlmprune.adapters.image_tower import ImageTower, Pool, patch_of
from vlmprune.errors import UsageError

TRUNKS = {"VisionTransformer", "Eva"}
BLOCKS = {"Block", "EvaBlock", "EvaBlockPostNorm", "ResPostBlock"}
"""Classes of timm whose blocks take tokens, and attend to all of them without a bias of their places."""
SUITS = "wrap a model whose image tower is a ViT"


def tower_in(model: nn.Module) -> ImageTower | None:
    """The image tower in a model of open_clip or timm; None if the model is of neither.

    Args:
        model: a model of open_clip, the `visual` of one, or a model of timm.

    Raises:
        UsageError: its tower is no list of blocks through which patches go.
    """
    if _made_by(model, "timm"):
        return _of_timm(model, "", f"a model of timm ({type(model).__name__})")
    if not _made_by(model, "open_clip"):
        return None
    root = "visual" if isinstance(getattr(model, "visual", None), nn.Module) else ""
    tower = model.get_submodule(root)
    name = f"an image tower of open_clip ({type(tower).__name__})"
    trunk = getattr(tower, "trunk", None)
    if isinstance(trunk, nn.Module):
        return _of_timm(tower, root, f"an image tower of timm in open_clip ({type(trunk).__name__})", "trunk.")
    if not hasattr(tower, "conv1") or not hasattr(getattr(tower, "transformer", None), "resblocks"):
        raise UsageError(f"{name} has no blocks through which patches go, so that nothing can be dropped there: {SUITS}.")
    return _native(tower, root, name)


def _made_by(module: nn.Module, package: str) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(module).__mro__)


def _native(tower: Any, root: str, name: str) -> ImageTower:
    blocks = tower.transformer.resblocks
    pools = []
    if tower.attn_pool is not None:
        pools.append(Pool("attn_pool.attn", "key_padding_mask"))
        if getattr(tower, "attn_pool_type", "") == "parallel":
            pools.append(Pool("attn_pool_contrastive.attn", "key_padding_mask"))
    after = tower.final_ln_after_pool or tower.attn_pool is not None  # the norm then comes after pooling
    return ImageTower(
        name=name,
        root=root,
        blocks="transformer.resblocks",
        before=1,
        cls=True,
        grid=_pair(tower.grid_size),
        width=tower.class_embedding.shape[0],
        queries=tower.class_embedding.shape[0],
        image=_pair(tower.image_size),
        patch=patch_of(tower.conv1),
        averaged=f"transformer.resblocks.{len(blocks) - 1}" if after else "ln_post",
        pools=tuple(pools),
    )


def _of_timm(tower: nn.Module, root: str, name: str, inside: str = "") -> ImageTower:
    trunk: Any = tower.get_submodule(inside.rstrip("."))
    blocks = list(getattr(trunk, "blocks", []))
    kinds = {type(block).__name__ for block in blocks}
    if type(trunk).__name__ not in TRUNKS or not kinds or not kinds <= BLOCKS:
        what = f"blocks of a kind that is not known ({', '.join(sorted(kinds))})" if kinds else "no list of blocks"
        what = "a way of its own to run its blocks" if kinds and kinds <= BLOCKS else what
        raise UsageError(f"{name} has {what}, so that nothing can be dropped there: {SUITS}.")
    embedding = trunk.patch_embed
    if embedding.grid_size is None:
        raise UsageError(
            f"{name} takes pictures of any size, of which the raster is not known beforehand: {SUITS} of one size."
        )
    attention, pool = blocks[0].attn, getattr(trunk, "attn_pool", None)
    if pool is not None and (
        getattr(pool, "pos_embed", None) is not None or "attn_mask" not in signature(pool.forward).parameters
    ):
        raise UsageError(
            f"{name} pools by {type(pool).__name__}, which needs every patch in its place: {SUITS} and a CLS token."
        )
    before = trunk.num_prefix_tokens
    return ImageTower(
        name=name,
        root=root,
        blocks=f"{inside}blocks",
        before=before,
        cls=before == 1 and trunk.cls_token is not None,
        grid=_pair(embedding.grid_size),
        width=trunk.embed_dim,
        queries=attention.num_heads * attention.head_dim,
        image=None if embedding.img_size is None or not embedding.strict_img_size else _pair(embedding.img_size),
        patch=patch_of(getattr(embedding, "proj", None)) if type(embedding).__name__ == "PatchEmbed" else None,
        averaged=f"{inside}norm",
        averages_before=bool(getattr(trunk, "pool_include_prefix", False)),
        pools=() if pool is None else (Pool(f"{inside}attn_pool", "attn_mask"),),
        rotary="rope" if getattr(trunk, "rope", None) is not None else None,
    )


def _pair(size: Any) -> tuple[int, int]:
    rows, columns = size
    return int(rows), int(columns)
