"""Towers that write the sizes of pictures and patches as pairs (InternViT): counted as their models count."""

import pytest
import torch
from tiny_models import IMAGE
from transformers import InternVLVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmprune as vp
from vlmprune.adapters.llava import LLAVA


def internvit(image, patch):
    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=image, patch_size=patch
    )
    text = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("image", "patch"), [([32, 32], [8, 8]), ([32, 64], [8, 16]), ([48, 48], [12, 12])])
@pytest.mark.parametrize("recipe", ["divprune:layer=0,fraction=0.5", "fastv:layer=2,fraction=0.5", "random:layer=0,tokens=3"])
@torch.no_grad()
def test_a_tower_with_pairs_is_pruned(image, patch, recipe):
    model, visual = internvit(image, patch), (image[0] // patch[0]) * (image[1] // patch[1])
    ids = torch.tensor([[9, 10, *[IMAGE] * visual, 11, 12]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, *image)}
    plain = model(**inputs).logits
    with vp.wrap(model, recipe) as run:
        model.generate(**inputs, max_new_tokens=2)
        model(**inputs)
        (stage,) = run.report().stages
        assert stage.original == (visual,)
        assert stage.kept == (3 if "tokens" in recipe else visual // 2,)
    with vp.wrap(model, "divprune:layer=0,fraction=1.0"):
        assert torch.equal(model(**inputs).logits, plain)


def test_the_grid_of_pairs():
    config = internvit([32, 48], [8, 16]).config
    assert LLAVA.image_grid({"pixel_values": torch.zeros(2, 3, 32, 48)}, config) == [(4, 3)] * 2
    sizes = torch.tensor([[16, 32], [8, 48]])
    assert LLAVA.image_grid({"pixel_values": torch.zeros(2, 3, 32, 48), "image_sizes": sizes}, config) == [(2, 2), (1, 3)]
