"""Tiny configurations of the model families, one function each: width 32, six decoder layers, a vocabulary of 96.

Layer kinds, windows, blocks and injected layers are those of the real checkpoints in small: a window of 24 tokens, which a
prompt with two pictures exceeds; DeepStack into the first three layers; recurrent layers around layers with attention.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma4.configuration_gemma4 import Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig

LAYERS = 6
VOCAB = 96
WIDTH = 32
WINDOW = 24
PAD, IMAGE, VIDEO, START, END, BREAK, FAKE, ROW = range(8)
FIRST_WORD = 8

SIDE = 6
"""Patches along a tile's side."""
PATCH = 4
TOWER = 16
"""Width of the vision towers."""

SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "linear_attention", "full_attention"]
CONV = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]


def _text(config: type, **more: Any) -> Any:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    return config(**{**settings, **more})


def _siglip(**more: Any) -> Any:
    return tf.SiglipVisionConfig(
        hidden_size=TOWER,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        vision_use_head=False,
        **more,
    )


def _clip(side: int = 3) -> Any:
    return tf.CLIPVisionConfig(
        hidden_size=TOWER,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side * PATCH,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )


NEXT_SIDE = 3
"""Patches along a crop's side where pictures become several crops (LLaVA-NeXT, LLaVA-OneVision)."""
PINPOINTS = [[12, 24], [24, 12], [24, 24]]
POOLED_SIDE = 4
"""The same of LLaVA-NeXT-Video, where squares of 2 × 2 patches of a frame become one token."""
POOLED_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
SIZES = ((10, 10), (23, 15))
"""(height, width) in pixels of even and odd pictures of the families with crops."""

MERGED = ((3, 3), (3, 4))
"""Merged (rows, columns) of even and odd pictures of any resolution."""
MERGE, TIME = 2, 2


def _packed_vision(**more: Any) -> dict[str, Any]:
    """Towers in the manner of Qwen: all patches of a batch in one sequence."""
    settings = {
        "depth": 4,
        "hidden_size": TOWER,
        "intermediate_size": 24,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TIME,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 64,
    }
    return {**settings, **more}


_QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_QWEN2_VISION = ("depth", "embed_dim", "mlp_ratio", "num_heads", "in_channels")
_QWEN2_VISION += ("patch_size", "spatial_merge_size", "temporal_patch_size")
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def qwen2_vl() -> Any:
    vision = _packed_vision(embed_dim=TOWER, mlp_ratio=2)
    vision = {name: value for name, value in vision.items() if name in _QWEN2_VISION} | {"hidden_size": WIDTH}
    text = _text(tf.Qwen2VLTextConfig, rope_parameters=_MROPE)
    return tf.Qwen2VLConfig(vision_config=vision, text_config=text.to_dict(), **_QWEN_TOKENS)


def qwen2_5_vl() -> Any:
    """Windows of 2×2 tokens in the tower, but for block 1."""
    vision = _packed_vision(window_size=2 * MERGE * PATCH, fullatt_block_indexes=[1])
    vision.pop("num_position_embeddings")
    text = _text(tf.Qwen2_5_VLTextConfig, rope_parameters=_MROPE)
    return tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text.to_dict(), **_QWEN_TOKENS)


def qwen3_vl() -> Any:
    text = _text(tf.Qwen3VLTextConfig, head_dim=8, rope_parameters={**_MROPE, "mrope_interleaved": True})
    vision = _packed_vision(deepstack_visual_indexes=[0, 1, 2])
    return tf.Qwen3VLConfig(vision_config=vision, text_config=text.to_dict(), **_QWEN_TOKENS)


_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def qwen3_vl_moe() -> Any:
    rope = {**_MROPE, "mrope_interleaved": True}
    text = _text(tf.Qwen3VLMoeTextConfig, head_dim=8, rope_parameters=rope, **_EXPERTS)
    vision = _packed_vision(deepstack_visual_indexes=[0, 1, 2])
    return tf.Qwen3VLMoeConfig(vision_config=vision, text_config=text.to_dict(), **_QWEN_TOKENS)


_HYBRID = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {**_MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}


def qwen3_5() -> Any:
    text = _text(tf.Qwen3_5TextConfig, layer_types=LINEAR, **_HYBRID)
    return tf.Qwen3_5Config(vision_config=_packed_vision(), text_config=text.to_dict(), **_QWEN_TOKENS)


def qwen3_5_moe() -> Any:
    text = _text(tf.Qwen3_5MoeTextConfig, layer_types=LINEAR, shared_expert_intermediate_size=24, **_HYBRID, **_EXPERTS)
    return tf.Qwen3_5MoeConfig(vision_config=_packed_vision(), text_config=text.to_dict(), **_QWEN_TOKENS)


def internvl() -> Any:
    vision = tf.InternVLVisionConfig(
        hidden_size=TOWER,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
        use_qk_norm=True,
    )
    return tf.InternVLConfig(
        vision_config=vision,
        text_config=_text(tf.Qwen3Config, head_dim=8),
        image_token_id=IMAGE,
        image_seq_length=(SIDE // 2) ** 2,
        tie_word_embeddings=False,
    )


def gemma3() -> Any:
    text = _text(tf.Gemma3TextConfig, head_dim=8, layer_types=SLIDING, sliding_window=WINDOW, query_pre_attn_scalar=8)
    return tf.Gemma3Config(
        vision_config=_siglip(),
        text_config=text,
        mm_tokens_per_image=9,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def _gemma4(**more: Any) -> Any:
    settings = {
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": list(SLIDING),
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
    }
    text = _text(Gemma4TextConfig, **{**settings, **more})
    vision = Gemma4VisionConfig(
        hidden_size=TOWER,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pooling_kernel_size=MERGE,
        patch_size=PATCH,
        position_embedding_size=64,
    )
    return Gemma4Config(
        text_config=text,
        vision_config=vision,
        boi_token_id=START,
        eoi_token_id=END,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boa_token_id=BREAK,
        eoa_token_index=FAKE,
        audio_token_id=ROW,
        tie_word_embeddings=False,
    )


def gemma4() -> Any:
    return _gemma4(attention_k_eq_v=True, num_global_key_value_heads=1)


def gemma4_moe() -> Any:
    return _gemma4(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24)


def gemma4_e() -> Any:
    return _gemma4(
        use_bidirectional_attention=None,
        layer_types=["sliding_attention", "full_attention"] * 3,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        num_kv_shared_layers=2,
    )


def llava_onevision() -> Any:
    vision = _siglip()
    vision.image_size = NEXT_SIDE * PATCH
    return tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text(tf.Qwen2Config),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )


def llava_next_video() -> Any:
    return tf.LlavaNextVideoConfig(
        vision_config=_clip(POOLED_SIDE),
        text_config=_text(tf.LlamaConfig),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=POOLED_SIDE**2,
        image_grid_pinpoints=POOLED_PINPOINTS,
        tie_word_embeddings=False,
    )


def llava_next() -> Any:
    return tf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text(tf.LlamaConfig),
        image_token_index=IMAGE,
        image_seq_length=NEXT_SIDE**2,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )


def llava() -> Any:
    return tf.LlavaConfig(
        vision_config=_clip(),
        text_config=_text(tf.LlamaConfig),
        image_token_index=IMAGE,
        image_seq_length=NEXT_SIDE**2,
        tie_word_embeddings=False,
    )


def _tiles_vision(config: type) -> Any:
    return config(
        hidden_size=TOWER,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE * PATCH,
        patch_size=PATCH,
    )


def idefics3() -> Any:
    return tf.Idefics3Config(
        vision_config=_tiles_vision(tf.Idefics3VisionConfig),
        text_config=_text(tf.LlamaConfig),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )


def smolvlm() -> Any:
    return tf.SmolVLMConfig(
        vision_config=_tiles_vision(tf.SmolVLMVisionConfig),
        text_config=_text(tf.LlamaConfig),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )


def mistral3() -> Any:
    vision = tf.PixtralVisionConfig(
        hidden_size=TOWER,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16 * PATCH,
        patch_size=PATCH,
    )
    return tf.Mistral3Config(
        vision_config=vision,
        text_config=_text(tf.MistralConfig, head_dim=8, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
        tie_word_embeddings=False,
    )


def _glm(config: type) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    text = _text(tf.Glm4vTextConfig, num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope)
    vision = _packed_vision(image_size=SIDE * PATCH)
    vision.pop("num_position_embeddings")
    return config(
        vision_config={**vision, "model_type": "glm4v_vision"},
        text_config={**text.to_dict(), "model_type": "glm4v_text"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=BREAK,
        video_end_token_id=FAKE,
        tie_word_embeddings=False,
    )


def glm4v() -> Any:
    return _glm(tf.Glm4vConfig)


def glm46v() -> Any:
    return _glm(tf.Glm46VConfig)


def glm4v_moe() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    experts = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    vision = _packed_vision(image_size=SIDE * PATCH)
    vision.pop("num_position_embeddings")
    return tf.Glm4vMoeConfig(
        vision_config=vision,
        text_config=_text(tf.Glm4vMoeTextConfig, **heads, **experts).to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=BREAK,
        video_end_token_id=FAKE,
        tie_word_embeddings=False,
    )


def _paligemma(text: Any) -> Any:
    vision = _siglip()
    vision.image_size = NEXT_SIDE * PATCH
    return tf.PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vocab_size=VOCAB,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        tie_word_embeddings=False,
    )


def paligemma() -> Any:
    return _paligemma(_text(tf.GemmaConfig, head_dim=8))


def paligemma2() -> Any:
    kinds = ["sliding_attention", "full_attention"] * 3
    more = {"head_dim": 8, "layer_types": kinds, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
    return _paligemma(_text(tf.Gemma2Config, **more))


def lfm2_vl() -> Any:
    text = _text(tf.Lfm2Config, layer_types=CONV, block_auto_adjust_ff_dim=False)
    vision = tf.Siglip2VisionConfig(
        hidden_size=TOWER,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=PATCH,
        num_patches=36,
        vision_use_head=False,
    )
    return tf.Lfm2VlConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        projector_hidden_size=24,
        downsample_factor=2,
        tie_word_embeddings=False,
    )


def _cohere() -> Any:
    more = {"layer_types": SLIDING, "sliding_window": WINDOW, "logit_scale": 1.0}
    return _text(tf.Cohere2Config, **more)


def aya_vision() -> Any:
    return tf.AyaVisionConfig(
        vision_config=_siglip(), text_config=_cohere(), image_token_index=IMAGE, downsample_factor=2, tie_word_embeddings=False
    )


def cohere2_vision() -> Any:
    return tf.Cohere2VisionConfig(
        vision_config=_siglip(),
        text_config=_cohere(),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=48,
        tie_word_embeddings=False,
    )


def video_llama_3() -> Any:
    vision = {
        "hidden_size": TOWER,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": PATCH,
    }
    return tf.VideoLlama3Config(
        vision_config=vision,
        text_config=_text(tf.Qwen2Config),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )


def ovis2() -> Any:
    vision = {
        "hidden_size": TOWER,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE * PATCH,
        "patch_size": PATCH,
        "vocab_size": 40,
        "hidden_stride": 2,
        "num_visual_indicator_tokens": 5,
    }
    return tf.Ovis2Config(
        vision_config=vision,
        text_config=_text(tf.Qwen2Config),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, BREAK, FAKE, ROW],
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        tie_word_embeddings=False,
    )


def janus() -> Any:
    vision = {
        "hidden_size": TOWER,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": NEXT_SIDE * PATCH,
        "patch_size": PATCH,
        "mlp_ratio": 2.0,
        "projection_dim": WIDTH,
        "num_image_tokens": NEXT_SIDE**2,
    }
    generating = {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    }
    return tf.JanusConfig(
        vision_config=vision,
        text_config=_text(tf.LlamaConfig),
        vq_config=generating,
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def deepseek_vl() -> Any:
    vision = _siglip()
    vision.image_size = NEXT_SIDE * PATCH
    return tf.DeepseekVLConfig(
        vision_config=vision, text_config=_text(tf.LlamaConfig), image_token_id=IMAGE, tie_word_embeddings=False
    )


HIGH = 48
"""Pixels on a side of what the second tower of DeepSeek-VL's hybrid sees."""


def deepseek_vl_hybrid() -> Any:
    vision = _siglip()
    vision.image_size = NEXT_SIDE * PATCH
    second = tf.SamVisionConfig(
        hidden_size=TOWER,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=HIGH,
        patch_size=PATCH,
        window_size=3,
        global_attn_indexes=[1],
        mlp_dim=24,
        num_pos_feats=8,
    )
    return tf.DeepseekVLHybridConfig(
        vision_config=vision,
        high_res_vision_config=second,
        text_config=_text(tf.LlamaConfig),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


# -- towers of timm, which is not installed ----------------------------------------------------------------------------------


class PatchTowerConfig(tf.PreTrainedConfig):
    """In the place of timm's configuration; a raster of patches per picture.

    `raster`: whether the tower returns `[picture, dim, row, column]` (FastVLM) or `[picture, token, dim]` (Perception-LM).
    """

    model_type = "patch_tower_of_the_tests"

    def __init__(self, hidden_size: int = TOWER, raster: bool = True, cls: bool = False, **kwargs: Any) -> None:
        self.hidden_size, self.raster, self.cls = hidden_size, raster, cls
        self.model_args = {"embed_dim": hidden_size}
        super().__init__(**kwargs)


class PatchTower(tf.PreTrainedModel):
    """A convolution over patches and one attention block: what stands behind these two families' `AutoModel` in the tests."""

    config_class = PatchTowerConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: PatchTowerConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, PATCH, PATCH)
        self.block = nn.TransformerEncoderLayer(config.hidden_size, 2, 24, dropout=0.0, batch_first=True)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.cls else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        hidden = self.patches(pixel_values)
        rows, columns = hidden.shape[-2:]
        hidden = hidden.flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            hidden = torch.cat([self.class_embedding.expand(len(hidden), -1, -1), hidden], 1)
        hidden = self.block(hidden)
        if self.config.raster:
            hidden = hidden.transpose(1, 2).unflatten(2, (rows, columns))
        return BaseModelOutputWithPooling(last_hidden_state=hidden)


tf.AutoConfig.register(PatchTowerConfig.model_type, PatchTowerConfig)
tf.AutoModel.register(PatchTowerConfig, PatchTower)


def fast_vlm() -> Any:
    return tf.FastVlmConfig(
        vision_config=PatchTowerConfig(),
        text_config=_text(tf.Qwen2Config),
        image_token_index=IMAGE,
        image_seq_length=NEXT_SIDE**2,
        tie_word_embeddings=False,
    )


def perception_lm() -> Any:
    return tf.PerceptionLMConfig(
        vision_config=PatchTowerConfig(raster=False, cls=True),
        text_config=_text(tf.LlamaConfig),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
