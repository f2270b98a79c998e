"""Image towers of open_clip, as its configurations have them, with less depth and width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import timm
from image_towers.towers import PATCH, SIDE, Tower
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": SIDE, "patch_size": PATCH, "width": 64, "head_width": 16, "layers": 6}
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
SMALL = {"img_size": SIDE, "embed_dim": 64, "depth": 5, "num_heads": 4}


def native(**more: Any) -> Callable[[], nn.Module]:
    """open_clip's own ViT."""
    return lambda: CLIP(16, VIT | more, TEXT)


def of_timm(name: str, pool: str, proj: str | None = None, **more: Any) -> Callable[[], nn.Module]:
    """A ViT of timm, smaller than timm makes it."""

    def make() -> nn.Module:
        plain = timm.create_model

        def small(name: str, **kwargs: Any) -> nn.Module:
            return plain(name, **kwargs, **SMALL | more)

        config = {"image_size": more.get("img_size", SIDE), "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}
        with mock.patch.object(timm, "create_model", small):
            return CustomTextCLIP(64 if proj == "none" else 16, config, TEXT)

    return make


def coca() -> nn.Module:
    """Its tower has learned queries behind the blocks, and returns a pair."""
    multimodal = {"width": 32, "context_length": 8, "vocab_size": 64, "layers": 1, "heads": 2, "dim_head": 16}
    pool = {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True}
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    return CoCa(32, multimodal | {"n_queries": 5, "attn_pooler_heads": 2}, text, VIT | pool)


def encode(model: Any, pixels: Tensor) -> Tensor:
    return model.encode_image(pixels)


BLOCKS, TRUNK = "visual.transformer.resblocks", "visual.trunk.blocks"

TOWERS = {
    "ViT-B-32": Tower(native(), encode, BLOCKS, 1),
    "ViT-B-16, averages": Tower(native(pool_type="avg"), encode, BLOCKS, 1, average="visual.ln_post"),
    "CLIPA": Tower(native(**CLIPA), encode, BLOCKS, 1, average=f"{BLOCKS}.5"),
    "sin-cos positions": Tower(native(pos_embed_type="sin_cos_2d"), encode, BLOCKS, 1),
    "QK norm": Tower(native(qk_norm=True), encode, BLOCKS, 1),
    "CoCa": Tower(coca, encode, BLOCKS, 1, pool="visual.attn_pool.attn"),
    "EVA02": Tower(of_timm("eva02_base_patch16_clip_224", "token", patch_size=PATCH), encode, TRUNK, 1),
    "PE": Tower(
        of_timm("vit_pe_core_base_patch16_224", "map", patch_size=PATCH), encode, TRUNK, 1, pool="visual.trunk.attn_pool"
    ),
    "MobileCLIP": Tower(
        of_timm("vit_base_mci_224", "token", img_size=2 * SIDE, embed_dim=768, depth=4), encode, TRUNK, 1, side=2 * SIDE
    ),  # its stem makes patches of 16 × 16 pixels, 768 numbers wide
    "SigLIP": Tower(
        of_timm("vit_base_patch16_siglip_224", "map", "none", patch_size=PATCH),
        encode,
        TRUNK,
        0,
        pool="visual.trunk.attn_pool",
    ),
}
