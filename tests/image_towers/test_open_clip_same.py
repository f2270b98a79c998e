"""The same weights in LLaVA's tower, in transformers' CLIP, and in open_clip: the same patches."""

from __future__ import annotations

import pytest
import torch
from image_towers.open_clip_towers import TEXT
from image_towers.promises import EXACT
from image_towers.towers import PATCH, PATCHES, SIDE, VISION, peaked, pictures
from open_clip.model import CLIP
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune as vp

IMAGE = 1


def llava() -> LlavaForConditionalGeneration:
    """With features from the last block, so that its tower has as many blocks to drop between as one that stands alone."""
    text = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return peaked(LlavaForConditionalGeneration(config))


def in_open_clip(tower: CLIPVisionModel) -> CLIP:
    """open_clip's ViT with the weights of a tower of transformers."""
    vision = {"image_size": SIDE, "patch_size": PATCH, "width": VISION["hidden_size"], "layers": VISION["num_hidden_layers"]}
    ratio = VISION["intermediate_size"] / VISION["hidden_size"]
    model = CLIP(16, vision | {"head_width": 8, "mlp_ratio": ratio}, TEXT, quick_gelu=True).eval()
    theirs, ours, state = tower.state_dict(), model.visual, dict[str, Tensor]()
    for part in ("weight", "bias"):
        state[f"ln_pre.{part}"], state[f"ln_post.{part}"] = theirs[f"pre_layrnorm.{part}"], theirs[f"post_layernorm.{part}"]
        for number in range(len(ours.transformer.resblocks)):
            block, layer = f"transformer.resblocks.{number}", f"encoder.layers.{number}"
            projections = [theirs[f"{layer}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            state[f"{block}.attn.in_proj_{part}"] = torch.cat(projections)
            state[f"{block}.attn.out_proj.{part}"] = theirs[f"{layer}.self_attn.out_proj.{part}"]
            for mine, their in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                state[f"{block}.{mine}.{part}"] = theirs[f"{layer}.{their}.{part}"]
    state["conv1.weight"] = theirs["embeddings.patch_embedding.weight"]
    state["class_embedding"] = theirs["embeddings.class_embedding"]
    state["positional_embedding"] = theirs["embeddings.position_embedding.weight"]
    ours.load_state_dict(state | {"proj": ours.proj})
    ours.proj = None  # features are what transformers calls pooled
    return model


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("recipe", ["flowcut:tokens=6", "flowcut:fraction=0.3"])
def test_same_patches(recipe):
    model, pixels = llava(), pictures(3)
    clip = model.model.vision_tower
    opened = in_open_clip(clip)
    assert (opened.encode_image(pixels) - clip(pixels).pooler_output).abs().max() < EXACT[torch.float32]
    ids = torch.tensor([[*[IMAGE] * PATCHES, 5, 6]] * 3)
    with vp.wrap(model, recipe) as run:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        in_llava = [kept.index.tolist() for kept in run.last.kept]
    with vp.wrap(clip, recipe) as run:
        features = clip(pixels).pooler_output
        in_clip = [kept.index.tolist() for kept in run.last.kept]
    with vp.wrap(opened, recipe) as run:
        assert (opened.encode_image(pixels) - features).abs().max() < EXACT[torch.float32]
        in_open = [kept.index.tolist() for kept in run.last.kept]
        assert len(run.last.left) > 1, "patches were dropped once only: the test shows too little"
    assert in_llava == in_clip == in_open
    assert len({tuple(kept) for kept in in_llava}) == 3, "all pictures keep the same patches: the test shows too little"
