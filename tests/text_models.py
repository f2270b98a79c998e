"""LLaVA with other towers and other text models than CLIP and Llama, tiny and of random weights."""

from __future__ import annotations

import torch
from tiny_models import IMAGE, LAYERS, LLAVA_GRID, LLAVA_PATCH, PAD, SUPPRESS, VOCAB
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    SiglipVisionConfig,
)

SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
SIZES |= {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
FULL = {"layer_types": ["full_attention"] * LAYERS}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OTHER = {
    "phi3": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},
    "granite": {"embedding_multiplier": 3.0},
    "cohere2": FULL,
    "olmo3": FULL,
    "gpt_oss": FULL | {"head_dim": 16, "num_local_experts": 4},
    "gemma2": FULL | {"head_dim": 16},
    "deepseek_v2": LATENT | EXPERTS | {"num_key_value_heads": 4},
    "deepseek_v3": LATENT | EXPERTS | {"num_key_value_heads": 4, "first_k_dense_replace": 3},
}
"""What a text model needs besides the sizes."""
EAGER = ("gemma2", "gpt_oss")
"""Text models that transformers runs with its eager attention only."""


def tower(kind: str, **more):
    """A tiny vision config: "clip", "siglip", "pixtral" or "dinov2" (CLS and four registers)."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    square = {"image_size": LLAVA_PATCH * LLAVA_GRID[0], "patch_size": LLAVA_PATCH}
    kinds = {
        "clip": lambda: CLIPVisionConfig(**sizes, **square, projection_dim=32, **more),
        "siglip": lambda: SiglipVisionConfig(**sizes, **square, **more),
        "pixtral": lambda: PixtralVisionConfig(**sizes, image_size=64, patch_size=LLAVA_PATCH, **more),
        "dinov2": lambda: Dinov2WithRegistersConfig(**sizes, **square, num_register_tokens=4, **more),
    }
    return kinds[kind]()


def text(kind: str, **more):
    return AutoConfig.for_model(kind, **{**SIZES, **OTHER.get(kind, {}), **more})


def build_llava(vision: str = "clip", decoder: str = "llama", layer=-2, strategy: str = "default", attn: str = "sdpa", **more):
    """A LLaVA of a tower and a text model, in evaluation mode (float32)."""
    config = LlavaConfig(
        vision_config=tower(vision),
        text_config=text(decoder, **more),
        image_token_id=IMAGE,
        image_seq_length=LLAVA_GRID[0] * LLAVA_GRID[1],
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    config._attn_implementation = "eager" if decoder in EAGER else attn
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for name, weight in model.named_parameters():
            norm = "norm" in name.lower()
            deviation = 0.05 if norm else 0.125 if "lm_head" in name else 0.2
            torch.nn.init.normal_(weight, float(norm and name.endswith("weight")), deviation)
    settings = model.generation_config
    settings.eos_token_id = settings.bos_token_id = None
    settings.pad_token_id, settings.suppress_tokens, settings.do_sample = PAD, SUPPRESS, False
    return model.float().eval()


def prompts(model, pictures: list[int], pixels: dict[str, torch.Tensor], seed: int = 0) -> dict:
    """One row per picture: words, as many placeholders as given, words; left-padded."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for number, count in enumerate(pictures):
        before, behind = (torch.randint(8, VOCAB, (n,), generator=random).tolist() for n in (2 + number, 5))
        rows.append(before + [IMAGE] * count + behind)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **pixels}
