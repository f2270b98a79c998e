"""Small random models of open_clip; the same in transformers; and one saved as open_clip saves."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

KINDS = {
    "ViT": {},
    "quick GELU": {"quick_gelu": True},
    "average pooling": {"vision": {"pool_type": "avg"}},
    "ResNet": {"vision": {"layers": (1, 1, 1, 1), "width": 8, "image_size": 64}},
}


def config(kind: str, width: int = 64, vocabulary: int = 49408) -> dict:
    """The configuration of a small model, as open_clip writes it."""
    given = KINDS[kind]
    vision = {"image_size": 40, "patch_size": 8, "width": width, "head_width": 16, "layers": 3}
    text = {"context_length": 77, "vocab_size": vocabulary, "width": 32, "heads": 2, "layers": 2}
    return {
        "embed_dim": 24,
        "vision_cfg": vision | given.get("vision", {}),
        "text_cfg": text,
        "quick_gelu": given.get("quick_gelu", False),
    }


def small(kind: str, width: int = 64, vocabulary: int = 49408) -> CLIP:
    """A model with weights large enough that pictures and texts differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**config(kind, width, vocabulary)).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(0, 0.2, generator=draw)
    return model


def saved(model: CLIP, folder: Path) -> str:
    """`local-dir:FOLDER` with a model of the kind "ViT", as open_clip reads it."""
    from safetensors.torch import save_file

    width = model.visual.proj.shape[0]
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "size": [40, 40]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config("ViT", width), "preprocess_cfg": preprocess}))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"


def own_tokenizer() -> CLIPTokenizer:
    """transformers' tokenizer with open_clip's vocabulary."""
    words = open_clip.get_tokenizer("ViT-B-32")
    merges = [tuple(pair) for pair in words.bpe_ranks]
    return CLIPTokenizer(
        vocab=dict(words.encoder),
        merges=merges,
        model_max_length=77,
        pad_token="<end_of_text>",
        bos_token="<start_of_text>",
        eos_token="<end_of_text>",
        unk_token="<end_of_text>",
    )


def converted(model: CLIP) -> CLIPModel:
    """The same model in transformers."""
    visual, vision, text = model.visual, config("ViT")["vision_cfg"], config("ViT")["text_cfg"]
    width = visual.proj.shape[0]
    quick = "QuickGELU" in type(model.transformer.resblocks[0].mlp.gelu).__name__
    act = {"hidden_act": "quick_gelu" if quick else "gelu", "layer_norm_eps": 1e-5}
    made = CLIPModel(
        CLIPConfig(
            vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": vision["layers"]}
            | {"num_attention_heads": width // 16, "image_size": 40, "patch_size": 8, **act},
            text_config={"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
            | {"vocab_size": text["vocab_size"], "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407, **act},
            projection_dim=24,
        )
    ).eval()
    state = {
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": model.text_projection.T,
        "logit_scale": model.logit_scale,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "vision_model.pre_layrnorm.weight": visual.ln_pre.weight,
        "vision_model.pre_layrnorm.bias": visual.ln_pre.bias,
        "vision_model.post_layernorm.weight": visual.ln_post.weight,
        "vision_model.post_layernorm.bias": visual.ln_post.bias,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
        "text_model.final_layer_norm.weight": model.ln_final.weight,
        "text_model.final_layer_norm.bias": model.ln_final.bias,
    }
    for part, blocks in (("vision_model", visual.transformer.resblocks), ("text_model", model.transformer.resblocks)):
        for number, block in enumerate(blocks):
            own = f"{part}.encoder.layers.{number}."
            for name, module in (
                ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2),
                ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
                ("self_attn.out_proj", block.attn.out_proj),
            ):
                state |= {f"{own}{name}.weight": module.weight, f"{own}{name}.bias": module.bias}
            parts = zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
            for letter, weight, bias in parts:
                state |= {f"{own}self_attn.{letter}_proj.weight": weight, f"{own}self_attn.{letter}_proj.bias": bias}
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing), missing
    return made
