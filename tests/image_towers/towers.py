"""Image towers for the tests: small, with random weights that make attention peaked, and what a pruned one must compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE, PATCH = 48, 8
"""Height and width of pictures, and of patches, in pixels."""
PATCHES = (SIDE // PATCH) ** 2
PEAK = 2.5
"""Factor on queries and on keys."""


@dataclass(frozen=True)
class Tower:
    """One kind of image tower.

    Attributes:
        make: builds a model with it.
        encode: its features of pictures.
        blocks: paths of its list of blocks, from the model.
        before: tokens before the patches.
        average: path of the module whose output is averaged, if patches are; the oracle averages what is left.
        pool: path of attention behind the blocks, if there is any; the oracle shows it what is left.
        side: height and width of its pictures, of 6 × 6 patches.
    """

    make: Callable[[], nn.Module]
    encode: Callable[[Any, Tensor], Tensor]
    blocks: str
    before: int
    average: str = ""
    pool: str = ""
    side: int = SIDE


def peaked(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random weights: attention looks at few patches, every block changes what it is given, and features are about 1."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim < 2:
            continue
        inputs = parameter.shape[0] if name.rpartition(".")[2] in ("proj", "text_projection") else parameter[0].numel()
        parameter.normal_(0, 0.9 * inputs**-0.5, generator=draw)
        if "embed" in name or parameter.ndim == 3:
            parameter.normal_(0, 0.5, generator=draw)
        if name.endswith(("in_proj_weight", "qkv.weight")):
            parameter[: 2 * len(parameter) // 3] *= PEAK
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter *= PEAK
    return model.eval()


def pictures(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """`[picture, 3, side, side]`: coarse noise, with an empty part that differs in size from picture to picture, so that
    methods which decide how much they keep differ as well."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, side // PATCH, side // PATCH, generator=draw)
    fine = functional.interpolate(coarse, size=(side, side)) + 0.3 * torch.randn(count, 3, side, side, generator=draw)
    for number in range(count):
        fine[number, :, : side * number // (count + 1)] = 0.5
    return fine


Kept = tuple[int, Sequence[Tensor], Sequence[Tensor] | None]
"""A block, and per picture the indices of patches that it and all later ones see, and their features if some were merged."""


def masked(tower: Tower, model: nn.Module, pixels: Tensor, kept: Sequence[Kept]) -> Tensor:
    """What a pruned tower must compute: the un-pruned one, where patches are hidden from all others from a block on.

    Queries of hidden patches are computed like the others, and nobody looks at the result. One picture after another, in a
    mode of its own that shares nothing with vlmprune: attention is computed by hand.
    """
    features = []
    for number, picture in enumerate(pixels):
        stays = [(block, index[number], None if merged is None else merged[number]) for block, index, merged in kept]
        features.append(_masked_one(tower, model, picture[None], stays))
    return torch.cat(features)


def _masked_one(tower: Tower, model: nn.Module, picture: Tensor, stays: list[tuple[int, Tensor, Tensor | None]]) -> Tensor:
    patches = PATCHES
    visible = torch.ones(tower.before + patches, dtype=torch.bool)
    handles, blocks = [], model.get_submodule(tower.blocks)
    hide = Hide()

    def enter(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0].clone()
            for block, left, merged in stays:
                if block == index:
                    visible[tower.before :] = False
                    visible[tower.before + left] = True
                    if merged is not None:
                        hidden[0, tower.before + left] = merged
            hide.visible = visible
            return (hidden, *args[1:]), kwargs

        return hook

    def average(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return torch.cat((out[:, : tower.before], out[:, tower.before :][:, visible[tower.before :]]), dim=1)

    def pool(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        keys = args[1] if len(args) > 1 else args[0]
        mine = visible if keys.shape[1] == len(visible) else visible[tower.before :]
        left = keys[:, mine]
        return ((args[0], left, left) if len(args) > 1 else (left,)), kwargs

    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
    if tower.average:
        handles.append(model.get_submodule(tower.average).register_forward_hook(average))
    if tower.pool:
        handles.append(model.get_submodule(tower.pool).register_forward_pre_hook(pool, with_kwargs=True))
    try:
        with hide:
            return tower.encode(model, picture)
    finally:
        for handle in handles:
            handle.remove()


class Hide(torch.overrides.TorchFunctionMode):
    """Hides keys in attention over as many tokens as `visible` says, which is computed by hand."""

    visible: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward and args[1].shape[0] == len(self.visible):
            kwargs = {**kwargs, "key_padding_mask": ~self.visible[None].expand(args[1].shape[1], -1)}
        if func is functional.scaled_dot_product_attention and args[1].shape[-2] == len(self.visible):
            query, key, value = args[:3]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            scores = (query * scale) @ key.transpose(-1, -2)
            return scores.masked_fill(~self.visible, -torch.inf).softmax(dim=-1) @ value
        return func(*args, **kwargs)


# -- transformers ------------------------------------------------------------------------------------------------------------

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def _clip_vision(projects: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

        kind = CLIPVisionModelWithProjection if projects else CLIPVisionModel
        return kind(CLIPVisionConfig(**VISION, projection_dim=16))

    return make


def _siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION))


def _siglip_vision() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**VISION))


def _of_output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


TRANSFORMERS = {
    "clip": Tower(_clip, lambda model, x: _of_output(model.get_image_features(x)), "vision_model.encoder.layers", 1),
    "clip vision": Tower(_clip_vision(False), lambda model, x: model(x).pooler_output, "encoder.layers", 1),
    "clip projection": Tower(_clip_vision(True), lambda model, x: model(x).image_embeds, "vision_model.encoder.layers", 1),
    "siglip": Tower(
        _siglip,
        lambda model, x: _of_output(model.get_image_features(x)),
        "vision_model.encoder.layers",
        0,
        pool="vision_model.head.attention",
    ),
    "siglip vision": Tower(_siglip_vision, lambda model, x: model(x).pooler_output, "encoder.layers", 0, pool="head.attention"),
}


@cache
def build(name: str, tower: Tower | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tower, nn.Module]:
    """A tower and a model with it, the same one each time; of transformers, if no tower is given."""
    tower = TRANSFORMERS[name] if tower is None else tower
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return tower, peaked(tower.make()).to(dtype)
