"""Folders with a small random model and its processor, in the form of published repositories: tokenizer, template, settings.

The processors are those of transformers; pictures go through Pillow, without torchvision. Words are the embedded model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from vlmprune import tiny

SIDE, PATCH, LAYERS = 48, 8, 4
"""Pixels on a side of a tile, and of a patch; decoder layers."""
WIDTH, TOWER = 64, 32


def template(picture: str) -> str:
    """A chat template that writes `picture` for a picture."""
    return (
        "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + picture + "{% else %} {{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    )


def tokenizer(picture: str, *names: str, **special: str) -> Any:
    """The embedded model's words, and special tokens.

    Args:
        picture: what the chat template writes for a picture.
        names: tokens without a name of their own.
        special: tokens by the name of the attribute that processors look them up with.
    """
    words = tf.AutoProcessor.from_pretrained(tiny.CHECKPOINT, local_files_only=True).tokenizer
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=special
    )
    made.add_tokens([tf.AddedToken(name, special=True, normalized=False) for name in names])
    made.chat_template = template(picture)
    return made


def saved(folder: Path, model: type, config: Any, words: Any, image: dict[str, Any], **processor: Any) -> Path:
    """Model, tokenizer and settings in a folder.

    Args:
        image: settings of the image processor.
        processor: settings of the whole processor.
    """
    torch.manual_seed(0)
    made = model(config)
    made.generation_config.pad_token_id = 0
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "processor_class": processor["processor_class"]}))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _text(words: Any, kind: type, **more: Any) -> dict[str, Any]:
    text = {"vocab_size": len(words), "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return kind(**{**text, **more}).to_dict()


def _vision(**more: Any) -> dict[str, Any]:
    vision = {"hidden_size": TOWER, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**vision, "image_size": SIDE, "patch_size": PATCH, **more}


QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def qwen3_vl(folder: Path) -> Path:
    words = tokenizer("<|vision_start|><|image_pad|><|vision_end|>", *QWEN)
    image, video, start, end = words.convert_tokens_to_ids(list(QWEN))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {"depth": 3, "num_heads": 2, "hidden_size": TOWER, "intermediate_size": 48, "patch_size": PATCH}
    vision |= {"out_hidden_size": WIDTH, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    config = tf.Qwen3VLConfig(
        text_config=_text(words, tf.Qwen3VLTextConfig, head_dim=16, rope_parameters=rope),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    pixels = {"patch_size": PATCH, "merge_size": 2, "min_pixels": 32 * 32, "max_pixels": 128 * 128}
    pixels["image_processor_type"] = "Qwen2VLImageProcessorFast"
    return saved(folder, tf.Qwen3VLForConditionalGeneration, config, words, pixels, processor_class="Qwen3VLProcessor")


def internvl(folder: Path) -> Path:
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer("<IMG_CONTEXT>", **special, video_token="<video>")
    config = tf.InternVLConfig(
        text_config=_text(words, tf.Qwen3Config, head_dim=16),
        vision_config=_vision(),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=9,
    )
    pixels = {"image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": SIDE, "width": SIDE}}
    pixels |= {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    whole = {"processor_class": "InternVLProcessor", "image_seq_length": 9}
    return saved(folder, tf.InternVLForConditionalGeneration, config, words, pixels, **whole)


TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
IDEFICS = ("\n", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES)
LONGEST = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def _idefics(folder: Path, model: type, config: type, vision: type, name: str) -> Path:
    words = tokenizer("<image>", *IDEFICS)
    made = config(
        text_config=_text(words, tf.LlamaConfig),
        vision_config=vision(**_vision()),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    pixels = {"image_processor_type": f"{name}ImageProcessor", **LONGEST}
    return saved(folder, model, made, words, pixels, processor_class=f"{name}Processor", image_seq_len=9)


def idefics3(folder: Path) -> Path:
    return _idefics(folder, tf.Idefics3ForConditionalGeneration, tf.Idefics3Config, tf.Idefics3VisionConfig, "Idefics3")


def smolvlm(folder: Path) -> Path:
    return _idefics(folder, tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig, tf.SmolVLMVisionConfig, "SmolVLM")


def mistral3(folder: Path) -> Path:
    words = tokenizer("[IMG]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = tf.Mistral3Config(
        text_config=_text(words, tf.MistralConfig, head_dim=16, sliding_window=None),
        vision_config={**_vision(image_size=2 * SIDE, head_dim=16), "model_type": "pixtral"},
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    pixels = {"image_processor_type": "PixtralImageProcessorFast", "size": {"longest_edge": 2 * SIDE}}
    pixels["patch_size"] = {"height": PATCH, "width": PATCH}
    whole = {"processor_class": "PixtralProcessor", "patch_size": PATCH, "spatial_merge_size": 2}
    whole |= {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return saved(folder, tf.Mistral3ForConditionalGeneration, config, words, pixels, **whole)


def gemma3(folder: Path) -> Path:
    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer("<start_of_image>", **special)
    begin, end, image = words.convert_tokens_to_ids(list(special.values()))
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    config = tf.Gemma3Config(
        text_config=_text(words, tf.Gemma3TextConfig, head_dim=16, layer_types=kinds, sliding_window=64),
        vision_config={**_vision(vision_use_head=False), "model_type": "siglip_vision_model"},
        mm_tokens_per_image=9,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=image,
    )
    pixels = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    whole = {"processor_class": "Gemma3Processor", "image_seq_length": 9}
    return saved(folder, tf.Gemma3ForConditionalGeneration, config, words, pixels, **whole)


def llava_onevision(folder: Path) -> Path:
    words = tokenizer("<image>", "<image>", "<video>")
    image, video = words.convert_tokens_to_ids(["<image>", "<video>"])
    places = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = tf.LlavaOnevisionConfig(
        text_config=_text(words, tf.Qwen2Config),
        vision_config={**_vision(vision_use_head=False), "model_type": "siglip_vision_model"},
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=places,
    )
    pixels = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    pixels["image_grid_pinpoints"] = places
    whole = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 36, "vision_feature_select_strategy": "full"}
    return saved(folder, tf.LlavaOnevisionForConditionalGeneration, config, words, pixels, **whole)


def llava_next_video(folder: Path) -> Path:
    words = tokenizer("<image>", "<image>", "<video>")
    image, video = words.convert_tokens_to_ids(["<image>", "<video>"])
    places = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = tf.LlavaNextVideoConfig(
        text_config=_text(words, tf.LlamaConfig),
        vision_config={**_vision(projection_dim=TOWER), "model_type": "clip_vision_model"},
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=places,
    )
    side = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "image_grid_pinpoints": places}
    pixels = {"image_processor_type": "LlavaNextImageProcessor", **side}
    whole = {"processor_class": "LlavaNextVideoProcessor", "patch_size": PATCH, "num_additional_image_tokens": 1}
    whole["vision_feature_select_strategy"] = "default"
    return saved(folder, tf.LlavaNextVideoForConditionalGeneration, config, words, pixels, **whole)


GLM = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")


def glm4v(folder: Path) -> Path:
    words = tokenizer("<|begin_of_image|><|image|><|end_of_image|>", *GLM)
    image, video, start, end, first, last = words.convert_tokens_to_ids(list(GLM))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "partial_rotary_factor": 1.0}
    vision = {"depth": 2, "num_heads": 2, "hidden_size": TOWER, "intermediate_size": 48, "patch_size": PATCH}
    vision |= {"out_hidden_size": WIDTH, "image_size": SIDE}
    config = tf.Glm4vConfig(
        text_config=_text(words, tf.Glm4vTextConfig, rope_parameters=rope),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        image_start_token_id=start,
        image_end_token_id=end,
        video_start_token_id=first,
        video_end_token_id=last,
    )
    pixels = {"image_processor_type": "Glm4vImageProcessor", "patch_size": PATCH, "merge_size": 2}
    pixels["size"] = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    return saved(folder, tf.Glm4vForConditionalGeneration, config, words, pixels, processor_class="Glm4vProcessor")


FOLDERS: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (qwen3_vl, internvl, idefics3, smolvlm, mistral3, gemma3, llava_onevision, llava_next_video, glm4v)
}
